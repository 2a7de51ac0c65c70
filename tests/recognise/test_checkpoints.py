"""Checkpoints are opened where loops take what they would recompute, and closed again where they do not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, rewritten, tensors, text
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

T, D, V = 16, 4, 32


def inputs():
    return [*tensors((T, D), (V, D)), torch.randint(0, V, (T,))]


def head(x, w, y, body=F.linear, **how):
    return F.cross_entropy(checkpoint(body, x, w, use_reentrant=False, **how), y)


def checkpoints(gm):
    return sum(str(node.target) == "tag_activation_checkpoint" for node in gm.graph.nodes)


def test_an_opened_checkpoint_leaves_one_loop():
    gm, report = rewritten(captured(head, *inputs()))
    assert checkpoints(gm) == 0
    assert [region.backward for region in report.regions] == ["recompute"]
    assert not report.refusals


def recompute_all(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_RECOMPUTE


def several_layers(x, w):
    for _ in range(3):
        x = F.softmax(x @ x.t(), -1) @ x
    return F.linear(x, w)


@pytest.mark.parametrize(
    ("program", "options"),
    [
        (head, {"min_bytes": 1 << 30}),  # the loop is not worth it
        (head, {"disable": ("head",)}),
        (partial(head, body=lambda x, w: torch.fft.fft(F.linear(x, w)).real), {}),  # an op without a rule
        (partial(head, body=lambda x, w: F.linear(x, w).softmax(0)), {}),  # tokens that depend on one another
        (partial(head, body=several_layers), {}),  # it recomputes more than a loop takes
        (partial(head, context_fn=partial(create_selective_checkpoint_contexts, recompute_all)), {}),
        (partial(head, body=lambda x, w: F.linear(x, w).mul_(2)), {}),
    ],
    ids=["small", "disabled", "unknown", "mixed", "more", "policy", "write"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_no_loop_takes_stays_closed(program, options):
    gm = captured(lambda x, w, y: program(x, w, y), *inputs())
    before = text(gm)
    after, report = rewritten(gm, **options)
    assert after is gm
    assert text(gm) == before
    assert checkpoints(gm) == 1
    assert not report.regions


def test_one_checkpoint_is_closed_and_another_stays_open():
    def both(x, w, y):
        return head(x, w, y) + head(x.tanh(), w, y, body=lambda x, w: F.linear(x, w).softmax(0))

    gm, report = rewritten(captured(both, *inputs()))
    assert len(report.regions) == 1
    assert checkpoints(gm) == 1


def test_a_checkpoint_around_a_whole_head_holds_its_loop():
    def whole(x, w, y):
        return checkpoint(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x, w, y, use_reentrant=False) * 2

    gm, report = rewritten(captured(whole, *inputs()))
    assert [region.backward for region in report.regions] == ["recompute"]
    assert checkpoints(gm) == 1
