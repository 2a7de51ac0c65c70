"""Checkpointed blocks side by side: which are, and what the peaks and the report say of them."""

from __future__ import annotations

import pytest
import torch
from graphs import captured
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.predict.step_memory import Held, Segment, Timeline
from mst_fx.recognise.pattern import patterns
from mst_fx.survey.survey import Surveyor
from mst_fx.survey.surveyed import timeline_of

W = torch.nn.Parameter(torch.randn(8, 8))


def block(x, *more):
    return checkpoint(lambda x, *more: (x @ W).sin() + sum(more), x, *more, use_reentrant=False)


def heads(x):
    x, y = x.sin(), x.cos()
    return block(x) + block(y) + block(x) + block(y)


def layers(x):
    return block(block(x.sin()))


def layers_and_what_all_read(x):
    """As the layers of a decoder read what an encoder gives."""
    shared = x.sin()
    return block(block(x.cos(), shared), shared)


def apart(x):
    return block(x.sin()) + block(x.cos())


@pytest.mark.parametrize(
    ("program", "groups"), [(heads, [0, 1, 0, 1]), (layers, []), (layers_and_what_all_read, []), (apart, [])]
)
def test_blocks_are_side_by_side_where_they_share_an_activation_and_none_waits(program, groups):
    surveyed = Surveyor(mst_fx.Config(), patterns()).survey(captured(program, torch.randn(4, 8, requires_grad=True)))
    timeline = timeline_of(surveyed)
    found = [segment.beside for segment in timeline.segments if segment.beside is not None]
    numbers = sorted(set(found))
    assert [numbers.index(group) for group in found] == groups
    assert timeline.side_by_side == len(groups)


def test_the_peak_has_what_they_recompute_together():
    """Outside of regions; each is freed as backward has passed it."""
    region = Segment(region=0, block=2, beside=0)
    segments = (Segment(50, block=1, beside=0, entry=1), Segment(70, block=2, beside=0), region, Segment(8, block=3))
    timeline = Timeline(0, segments)
    held = [Held(saved=200, backward=5)]
    _, backward = timeline.moments(held)
    assert [moment.saved for moment in backward] == [1 + 8, 1 + 50 + 70 + 200, 1 + 50 + 70, 1 + 50, 0]
    for number, moment in zip((3, 2, 1, 0), backward, strict=False):
        shares = timeline.shares(held, number, backward=True)
        assert moment.saved == sum(s.entry + s.region + segments[s.segment].saved * s.whole for s in shares)


def test_the_report_says_that_there_may_be_more():
    report = mst_fx.explain(heads, torch.randn(4, 8, requires_grad=True))
    assert report.side_by_side == 4
    assert report.how_sure.startswith("4 checkpointed blocks read the same activation")
    assert "4 checkpointed blocks" in str(report)
