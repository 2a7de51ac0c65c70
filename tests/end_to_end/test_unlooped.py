"""Graph breaks between what makes a large value and what reads it are told, with Dynamo's reason and line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import mst_fx

T, D, V = 24, 8, 64


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


def inputs():
    x, head = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return x, head, torch.zeros(T, dtype=torch.int64)


def explained(fn, *given):
    return mst_fx.explain(fn, *given, options={"min_bytes": 0})


def broken(x, head, labels):
    logits = F.linear(x, head)
    torch._dynamo.graph_break()
    return F.cross_entropy(logits, labels)


def test_a_break_between_head_and_loss_is_named_at_both_ends():
    report = explained(broken, *inputs())
    assert [refusal.reason for refusal in report.refusals] == ["NO_LOSS", "NO_HEAD"]
    for refusal in report.refusals:
        assert "Call to `torch._dynamo.graph_break()`" in refusal.text
        assert refusal.text.endswith(": torch._dynamo.graph_break()")
        assert __file__ in refusal.text
        assert refusal.advice == "Remove the graph break between the head and its loss: one graph has to hold both."


def test_logits_on_both_sides_of_a_break_are_told_once():
    (logits,) = (value for value in explained(broken, *inputs()).unlooped if value.shape == (T, V))
    assert (logits.op, logits.reason, logits.enters) == ("torch.nn.functional.linear", "NO_LOSS", False)
    assert "torch._dynamo.graph_break()" in logits.why


def test_other_values_that_cross_a_break():
    def scores_apart(q, k):
        scores = q @ k.transpose(-1, -2)
        print("between")
        return scores.softmax(-1).square().mean()

    q, k = (torch.randn(1, 1, T, 4, requires_grad=True) for _ in range(2))
    scores, *_ = explained(scores_apart, q, k).unlooped
    assert (scores.reason, scores.shape) == ("OTHER_GRAPH", (1, 1, T, T))
    assert scores.why.startswith("made here and read in another graph, after a graph break: Failed to trace builtin")
    assert scores.why.endswith('print("between")')


def test_a_break_in_a_function_that_is_called():
    def projected(x, head):
        logits = F.linear(x, head)
        print("between")
        return logits

    report = explained(lambda x, head, labels: F.cross_entropy(projected(x, head), labels), *inputs())
    assert {refusal.reason for refusal in report.refusals} == {"NO_LOSS", "NO_HEAD"}
    assert all('print("between")' in refusal.text for refusal in report.refusals)


def test_logits_after_a_break_without_a_loss():
    def late(x, head):
        x = x.sin()
        print("between")
        return F.linear(x, head)

    (refusal,) = explained(late, *inputs()[:2]).refusals
    assert (refusal.reason, 'print("between")' in refusal.text) == ("NO_LOSS", True)
    assert "behind the break" in refusal.advice


def test_without_a_break_none_is_named():
    x, head, labels = inputs()
    for fn, given, reason in [
        (F.linear, (x, head), "NO_LOSS"),
        (F.cross_entropy, (F.linear(x, head), labels), "NO_HEAD"),
    ]:
        report = explained(lambda *args, fn=fn: fn(*args), *given)
        (refusal,) = report.refusals
        assert refusal.reason == reason
        assert "break" not in refusal.text + refusal.advice


def test_a_loss_compiled_alone_reads_what_is_made_outside():
    x, head, labels = inputs()
    (logits,) = explained(lambda logits, labels: F.cross_entropy(logits, labels), F.linear(x, head), labels).unlooped
    assert (logits.enters, logits.why) == (True, "made outside of the function that this graph holds, which reads it")
    assert not explained(lambda logits, labels: F.cross_entropy(logits, labels), torch.randn(T, V), labels).unlooped


def several_times(x):
    for _ in range(2):
        torch._dynamo.graph_break()
        x = x.sin()
    return x.sum()


def test_what_dynamo_leaves_to_eager_execution_is_told():
    """It skips a whole function for a break in a loop; then no graph is there to tell of."""
    report = mst_fx.explain(several_times, torch.randn(4))
    (note,) = report.notes
    assert report.graphs == 0
    assert note.startswith(f"several_times ({__file__}:")
    assert "has run without a compile, so that nothing of it was looped: Call to `torch._dynamo.graph_break()`" in note
    assert note.endswith(": torch._dynamo.graph_break()")
    assert note in mst_fx.summary().notes
    assert mst_fx.explain(torch.sin, torch.randn(4)).notes == ()  # of this compile alone


def test_what_is_beyond_the_limit_of_recompiles_is_told():
    def again(x):
        return x.sin().sum()

    compiled = torch.compile(again, backend="mst_fx", dynamic=False, options={"inner": "eager"})
    with torch._dynamo.config.patch(recompile_limit=1):
        for length in (2, 3):
            compiled(torch.randn(length))
    (note,) = (note for note in mst_fx.summary().notes if note.startswith("again ("))
    assert note.endswith("Dynamo recompile limit exceeded")
