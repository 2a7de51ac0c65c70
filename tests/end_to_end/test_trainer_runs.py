"""What happens around the steps of a trainer: evaluation, generation, checkpoints, copies, lower precision."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from through_inductor import without_code

import mst_fx

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
tiny = pytest.importorskip("tiny")  # where its packages are not installed
tiny.LAYERS = 1
pytestmark = pytest.mark.slow

RELATIVE = 2e-6
SAVED = {
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


class Generates(transformers.TrainerCallback):
    """Lets the model that is trained write a few tokens after each step."""

    def __init__(self):
        self.written = []

    def on_step_end(self, args, state, control, model=None, **others):
        model.eval()
        start = torch.tensor([[5, 6, 7]])
        self.written.append(model.generate(start, max_new_tokens=4, do_sample=False, use_cache=True).tolist())
        model.train()


def trainer(folder, **arguments):
    chosen = transformers.TrainingArguments(str(folder), **{**tiny.STEPS, **arguments})
    data = tiny.tokens(rows=16)
    sets = {"train_dataset": data, "eval_dataset": data[:4]}
    return transformers.Trainer(model=tiny.model(), args=chosen, **sets, callbacks=[Generates()])


def history(made):
    return [entry[key] for entry in made.state.log_history for key in ("loss", "eval_loss") if key in entry]


def written(made):
    return next(c.written for c in made.callback_handler.callbacks if isinstance(c, Generates))


@pytest.fixture(scope="module", params=["flag", "in place"])
def runs(request, tmp_path_factory):
    """A plain run, the same with mst_fx, the second half of it, resumed from a checkpoint, and reports."""
    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "ours", "resumed")]
    plain = trainer(folders[0], **SAVED)
    plain.train()
    torch._dynamo.reset()
    known = len(mst_fx.reports())
    made = []
    with mst_fx.enabled(**tiny.LOOP_ALL, returned_logits="drop"), without_code():
        for folder, checkpoint in ((folders[1], None), (folders[2], str(folders[1] / "checkpoint-2"))):
            made.append(trainer(folder, torch_compile=request.param == "flag", **SAVED))
            if request.param == "in place":
                made[-1].model.compile()
            made[-1].train(resume_from_checkpoint=checkpoint)
    torch._dynamo.reset()
    return plain, *made, mst_fx.reports()[known:]


def test_losses_of_training_and_evaluation_are_the_same(runs):
    plain, ours, resumed, _ = runs
    assert history(ours) == pytest.approx(history(plain), rel=RELATIVE)
    assert history(resumed) == pytest.approx(history(plain), rel=RELATIVE)
    assert len(history(plain)) == 6  # two evaluations


def test_generation_within_the_loop_is_the_same(runs):
    plain, ours, resumed, _ = runs
    assert written(ours) == written(plain)
    assert written(resumed) == written(plain)[2:]


def test_training_is_looped(runs):
    """The flag compiles for training alone; a model compiled in place evaluates and generates, too, with its logits."""
    training, *others = runs[-1]
    assert [region.pattern for region in training.regions] == ["gated_mlp", "head"]
    assert training.dropped
    assert not any(report.dropped for report in others)
    assert {len(report.regions) for report in others} in (set(), {0, 1, 2})  # one token, a prompt, an evaluation


def test_checkpoints_have_the_same_names_and_values(runs):
    plain, ours, *_ = runs
    names = Path("checkpoint-4") / "model.safetensors"
    expected, saved = (safetensors.load_file(Path(made.args.output_dir) / names) for made in (plain, ours))
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
def test_a_model_compiled_in_place_is_copied_and_pickled_as_without(again):
    model = tiny.model()
    names = list(model.state_dict())
    model.compile()
    batch = {name: value[None] for name, value in tiny.tokens(rows=1)[0].items()}
    with mst_fx.enabled(**tiny.LOOP_ALL, returned_logits="drop"), without_code():
        model(**batch).loss.backward()
        assert list(model.state_dict()) == names
        other = again(model)
        assert list(other.state_dict()) == names
        known = len(mst_fx.reports())
        loss = other(**batch).loss
        assert len(mst_fx.reports()) == known  # torch copies no compiled call: the copy runs as it is
    torch.testing.assert_close(loss, model(**batch).loss)


def test_bfloat16_autocast_with_checkpointing(tmp_path):
    losses = []
    for compiled in (False, True):
        with mst_fx.enabled(**tiny.LOOP_ALL), without_code():
            made = trainer(tmp_path, bf16=True, gradient_checkpointing=True, torch_compile=compiled)
            made.train()
        losses.append(history(made))
    assert losses[1] == pytest.approx(losses[0], rel=4e-3)
    assert [region.pattern for region in mst_fx.reports()[-1].regions] == ["head", "gated_mlp"]
