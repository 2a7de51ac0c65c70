"""`explain`: what it tells, of which compile."""

from __future__ import annotations

import threading

import pytest
import torch
from models import MlpLM, tokens

import mst_fx

LOOP_ALL = {"min_bytes": 0, "chunk_tokens": 8, "inner": "eager"}


@pytest.fixture(autouse=True)
def _reset():
    torch.manual_seed(0)
    torch._dynamo.reset()


def test_explain():
    report = mst_fx.explain(MlpLM(), *tokens(2), options={"min_bytes": 0, "chunk_tokens": 32})
    mlp, head = report.regions
    assert (mlp.pattern, mlp.module, mlp.backward) == ("gated_mlp", "mlp", "recompute")
    assert (head.pattern, head.backward, head.axis) == ("head", "in_forward", "dim 1 (37 positions)")
    assert mlp.chunks == head.chunks == 3
    assert "models.py" in mlp.source
    assert "self.down(F.silu(self.gate(x)) * self.up(x))" in mlp.source
    assert "2 looped, 0 left alone" in str(report)


def test_explain_of_a_small_model_says_why_not():
    report = mst_fx.explain(MlpLM(), *tokens())
    assert [refusal.reason for refusal in report.refusals] == ["SMALL", "SMALL"]
    assert "min_bytes is 64.0 MiB" in str(report)


def test_explain_raises_errors_of_options_as_they_are():
    for options, error in (({"chunks": 4}, ValueError), ({"chunk_tokens": "many"}, TypeError)):
        with pytest.raises(error, match=r"mst_fx: (unknown )?option 'chunk"):
            mst_fx.explain(MlpLM(), *tokens(), options=options)


def test_explain_counts_graphs():
    def broken_in_two(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    assert mst_fx.explain(broken_in_two, torch.ones(2)).graphs == 2


def test_explain_of_what_is_compiled_already():
    model, batch = MlpLM(), tokens()
    expected = str(mst_fx.explain(model, *batch, options=LOOP_ALL))
    for compiled in (torch.compile(model, backend="eager"), torch.compile(model.forward, backend="eager")):
        told = str(mst_fx.explain(compiled, *batch, options=LOOP_ALL))
        assert told.startswith(expected)
        assert "compiled already" in told
    model.compile(backend="eager")
    report = mst_fx.explain(model, *batch, options=LOOP_ALL)
    assert len(report.regions) == 2
    assert "compiled already" in str(report)


def test_explain_of_what_nobody_captures():
    with torch.compiler.set_stance("force_eager"):
        assert "no graph was captured" in str(mst_fx.explain(MlpLM(), *tokens()))


def test_explain_tells_of_its_own_compile_alone():
    made = {}

    def explained(length):
        made[length] = mst_fx.explain(MlpLM(), *tokens(1, 36), options={"min_bytes": 0, "chunk_tokens": length})

    threads = [threading.Thread(target=explained, args=(length,)) for length in (9, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for length, report in made.items():
        assert [region.chunks for region in report.regions] == 2 * [36 // length]


def llama(device, tokens, features):
    """One checkpointed layer in bfloat16, with eight heads and four of the keys."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=features, intermediate_size=features, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=64, max_position_embeddings=tokens, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        ids = torch.zeros(1, tokens, dtype=torch.long)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return lambda: model(input_ids=ids, labels=ids).loss


def test_shapes_alone_are_explained_as_what_would_run():
    """By the option, and by default where attention makes the peak."""
    of_tensors, of_shapes = (
        mst_fx.explain(llama(device, 512, 256), options={"head_groups": 4, "min_bytes": 2**18})
        for device in ("cpu", "meta")
    )
    for report in (of_tensors, of_shapes):
        assert [(region.pattern, region.chunks) for region in report.regions] == [("attention", 4)]
    assert of_shapes.peak == pytest.approx(of_tensors.peak, rel=0.01)
    assert of_shapes.peak_whole == pytest.approx(of_tensors.peak_whole, rel=0.01)
    assert any('on the device "meta"' in note for note in of_shapes.notes)
    assert of_tensors.notes == ()
    torch._dynamo.reset()
    report = mst_fx.explain(llama("meta", 32768, 512))
    assert "attention" in [region.pattern for region in report.regions]
