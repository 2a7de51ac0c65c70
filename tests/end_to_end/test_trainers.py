"""Trainers as they come: each example trains the same with mst_fx as without, and loops what it says."""

from __future__ import annotations

import importlib

import pytest
import torch._inductor.config as inductor
from through_inductor import without_code

import mst_fx

tiny = pytest.importorskip("tiny")  # where its packages are not installed
tiny.LAYERS = 1  # which compile in half the time
pytestmark = pytest.mark.slow

NEEDS = {
    "transformers_trainer": (),
    "peft_adapters": ("peft",),
    "accelerate_loop": (),
    "lightning_module": ("lightning",),
    "own_loop": (),
    "sft": ("trl",),
    "preferences": ("trl",),
    "grpo": ("trl",),
    "distillation": ("trl",),
}


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate's settings are those of the process, from the first trainer on."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def example(name):
    """The module of an example, if what it needs is installed."""
    for package in NEEDS[name]:
        pytest.importorskip(package)
    return importlib.import_module(name)


@pytest.mark.parametrize("name", NEEDS)
def test_losses_are_the_same_and_all_is_looped(name):
    for run in example(name).RUNS:
        with without_code():
            found = tiny.compared(run)
        assert found.difference <= run.error, f"{run.title}: {found.plain} and {found.ours}"
        assert found.looped == run.looped, f"{run.title}: {found.report}"
        assert len(set(found.plain)) == len(found.plain) or name == "grpo", f"{run.title} does not learn"


def test_with_code_of_inductor():
    with inductor.patch({"cpp.simdlen": 1, "compile_threads": 1}):  # plain kernels are compiled the fastest
        found = tiny.compared(example("transformers_trainer").RUNS[0])
    assert found.difference <= 2e-6
    assert found.looped == {"gated_mlp": 1, "head": 1}


def refusals(train, **options):
    """What a report says of heads that a run does not loop."""
    known = len(mst_fx.reports())
    with mst_fx.enabled(**tiny.LOOP_ALL, **options), without_code():
        train(True)
    return [entry for report in mst_fx.reports()[known:] for entry in report.refusals if entry.reason != "AXIS_MIXED"]


def test_what_parts_head_and_loss_is_told():
    """The flag compiles the model alone, so a loss of the trainer's is behind it; a graph break is told by its line."""
    flag = example("transformers_trainer").trainer(label_smoothing_factor=0.1, torch_compile=True)
    (refusal,) = refusals(lambda _: flag.train())
    assert refusal.reason == "NO_LOSS"
    assert "Compute the loss inside the compiled function" in refusal.advice
    dora = example("peft_adapters")
    told = refusals(lambda _: dora.losses({"target_modules": ["lm_head"], "use_dora": True}, True))
    assert {entry.reason for entry in told} == {"NO_LOSS", "NO_HEAD"}
    assert all("peft/utils/integrations.py" in entry.text for entry in told), "\n".join(map(str, told))


def test_where_trl_leaves_the_graph_is_told():
    known = len(mst_fx.reports())
    with mst_fx.enabled(**tiny.LOOP_ALL), without_code():
        example("sft").nll(True)
    told = [entry.why for report in mst_fx.reports()[known:] for entry in report.unlooped]
    assert any("after a graph break" in why and "trl/kernels/chunked_logprob.py" in why for why in told)
