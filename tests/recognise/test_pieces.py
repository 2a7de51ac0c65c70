"""Pieces of logits that are read alike are joined; others are told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, rewritten, tensors

from mst_fx.runtime.loop_operator import LoopSpec
from mst_fx.runtime.mini_sequence import CallSpec, mini_sequence

T, D, V = 32, 4, 32


def inputs():
    return [*tensors((T, D), (V, D)), torch.randint(0, V, (T,))]


def rewrite(program, **options):
    return rewritten(captured(lambda x, w, y: program(F.linear(x, w), y), *inputs()), **options)


def rows_by_row(logits, y):
    return sum(F.cross_entropy(z, t) for z, t in zip(logits.split(2), y.split(2), strict=True))


def test_many_pieces_make_one_loop_with_one_gradient_of_the_weight():
    gm, report = rewrite(rows_by_row)
    (region,) = report.regions
    assert region.backward == "recompute"
    (call,) = (node for node in gm.graph.nodes if node.target is mini_sequence)
    spec = CallSpec(*call.args[4])
    assert len(spec.wanted) == 2
    assert len(LoopSpec(*spec.forward_spec).outs) == 1  # the losses of all tokens
    assert not report.refusals


def test_small_logits_stay_in_pieces():
    gm = captured(lambda x, w, y: rows_by_row(F.linear(x, w), y), *inputs())
    after, report = rewritten(gm, min_bytes=1 << 30)
    assert after is gm
    assert not report.regions


def carried(logits, y):
    carry = 0.0
    for z in logits.split(8):
        carry = (z * 1.5 + carry).logsumexp(-1).mean()
    return carry


def read_in_two_ways(logits, y):
    return F.cross_entropy(logits[:12], y[:12]) + logits[12:].square().sum()


def scaled_apart(logits, y):
    return F.cross_entropy(torch.cat([z / (i + 1) for i, z in enumerate(logits.split(8))]), y)


def overlapping(logits, y):
    return logits[:20].logsumexp(-1).mean() + logits[12:].logsumexp(-1).mean()


def mixed(logits, y):
    return sum(z.softmax(0).square().mean() for z in logits.split(8))


@pytest.mark.parametrize("program", [carried, read_in_two_ways, scaled_apart, overlapping, mixed])
def test_pieces_that_cannot_be_joined_stay_as_they_are_and_are_told(program):
    gm = captured(lambda x, w, y: program(F.linear(x, w), y), *inputs())
    after, report = rewritten(gm)
    assert after is gm
    assert {refusal.reason for refusal in report.refusals} == {"AXIS_MIXED"}
