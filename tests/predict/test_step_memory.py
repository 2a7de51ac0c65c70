"""The peak of a step: from plain numbers of bytes, and what a product needs as it is measured."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured
from hypothesis import given
from hypothesis import strategies as st
from memory_probe import peak_bytes

from mst_fx.core.config import Config
from mst_fx.predict import step_memory
from mst_fx.predict.step_memory import Held, Segment, Timeline
from mst_fx.recognise.pattern import patterns
from mst_fx.survey.survey import Surveyor
from mst_fx.survey.surveyed import timeline_of

sizes = st.integers(0, 1000)


def peak(*segments, held=(), resident=0, returned=0):
    return Timeline(resident, segments, returned).peak(held)


def test_backward_holds_what_is_saved_up_to_a_segment():
    assert peak(Segment(saved=10), Segment(saved=5, passing=3), Segment(passing=4)) == 10 + 5 + 4
    assert peak(Segment(saved=10, passing=9), Segment(saved=5)) == 10 + 9  # what stands behind is freed by then


def test_inputs_and_results_are_there_all_the_time():
    assert peak(Segment(saved=10, passing=3), resident=100, returned=20) == 100 + 20 + 10 + 3


def test_gradients_of_inputs_add_up():
    """Those of a segment are there behind it; at the end all of them, and the inputs."""
    assert peak(Segment(passing=5, gradients=100), Segment(gradients=7), resident=1) == 1 + 100 + 7
    assert peak(Segment(passing=50, gradients=10), Segment(gradients=7), resident=1) == 1 + 7 + 50


@pytest.mark.parametrize(("forward", "backward", "expected"), [(30, 4, 10 + 30), (1, 30, 10 + 5 + 30)])
def test_a_region_holds_most_in_one_of_its_loops(forward, backward, expected):
    assert peak(Segment(saved=10), Segment(region=0), held=[Held(forward, 5, backward)]) == expected


def test_a_region_gets_a_gradient_from_behind():
    """It is there while backward runs the region, beside what that holds."""
    assert peak(Segment(saved=10), Segment(region=0, upstream=7), held=[Held(3, 5, 30)]) == 10 + 5 + 30 + 7
    assert peak(Segment(saved=10), Segment(region=0, upstream=7), held=[Held(60, 5, 30)]) == 10 + 60


def test_a_block_is_computed_again_when_backward_enters_it():
    """Of each block its input is kept, and what it saves is alive while backward passes it."""
    one, two = (Segment(saved=saved, block=number, entry=1) for number, saved in enumerate((50, 70)))
    assert peak(one) == 51
    assert peak(one, two) == 2 + 70


def test_what_is_on_the_host():
    """A value leaves when its block has run, and comes back when backward enters the block behind it."""
    blocks = [
        Segment(entry=5, away=4, block=0),
        Segment(entry=50, away=40, block=1),
        Segment(entry=500, away=400, block=2),
    ]
    timeline = Timeline(0, (blocks[0], Segment(block=0), blocks[1], Segment(), blocks[2], Segment()))
    forward, backward = timeline.moments([])
    assert [moment.saved for moment in forward] == [0, 5, 5, 55, 55, 555]
    assert [moment.saved for moment in backward] == [555, 555, 55, 55, 5, 5, 0]
    forward, backward = timeline.offloading(3).moments([])
    assert [moment.saved for moment in forward] == [0, 5, 1, 11, 11, 111]
    assert [moment.saved for moment in backward] == [111, 551, 51, 55, 5, 5, 0]
    _, backward = timeline.offloading(2).moments([])  # the last block keeps its value on the device
    assert [moment.saved for moment in backward] == [511, 511, 11, 55, 5, 5, 0]
    shares = timeline.offloading(3).shares([], 5, backward=False)
    assert [share.entry for share in shares] == [1, 0, 10, 0, 100]


@pytest.mark.parametrize(("passing", "expected"), [(10, 100 + 5), (11, 100 + 5), (0, 100), (300, 300)])
def test_forward_needs_half_of_what_backward_needs(passing, expected):
    """A block keeps 100 bytes that backward does not need: there alone forward holds more than backward."""
    block = (Segment(region=0, block=0), Segment(passing=passing, block=0))
    assert peak(*block, held=[Held(saved_results=100)]) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_what_a_square_product_needs_is_measured(dtype, bias):
    """Its result in forward; in backward the gradients of its result and of its tokens."""
    x, w, b = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((4096, 256), (256, 256), (256,)))
    w, b = torch.nn.Parameter(w), torch.nn.Parameter(b) if bias else None

    def backward():
        torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)

    y = F.linear(x, w, b)
    measured = peak_bytes(lambda: F.linear(x, w, b)), peak_bytes(backward)
    surveyed = Surveyor(Config(), patterns()).survey(captured(lambda x, w, b: F.linear(x, w, b), x, w, b))
    needs = [replace(part, saved=0, gradients=0) for part in timeline_of(surveyed).segments]
    saved = 10 * max(measured)  # in a block that saves what backward does not need, forward makes the peak
    block = Segment(region=0, block=0), *(replace(part, block=0) for part in needs)
    assert peak(*block, held=[Held(saved_results=saved)]) - saved == pytest.approx(measured[0], rel=0.1)
    assert peak(*needs) == pytest.approx(measured[1], rel=0.1)


@given(st.lists(st.builds(Segment, saved=sizes, passing=sizes, gradients=sizes, block=st.sampled_from([None, 1]))))
def test_anywhere_else_what_forward_needs_decides_nothing(segments):
    peaks = set()
    for divisor in (1, step_memory.FORWARD_DIVISOR, 10**9):
        with mock.patch.object(step_memory, "FORWARD_DIVISOR", divisor):
            peaks.add(peak(*segments))
    assert len(peaks) == 1


@given(st.lists(st.tuples(sizes, sizes, sizes, st.booleans()), max_size=8), st.data())
def test_shares_are_what_is_saved_at_each_moment(parts, data):
    """Plain segments and checkpointed blocks of two segments each, one of them a region."""
    segments, held = [], []
    for number, (saved, entry, region, in_block) in enumerate(parts):
        block = number if in_block else None
        segments += [Segment(saved, block=block, entry=entry if in_block else 0), Segment(region=number, block=block)]
        held.append(Held(saved=region, saved_results=data.draw(st.integers(0, region)) if in_block else 0))
    timeline = Timeline(0, tuple(segments))
    forward, backward = timeline.moments(held)
    for number, segment in enumerate(segments):
        for moment, is_backward in ((forward[number], False), (backward[len(segments) - 1 - number], True)):
            shares = timeline.shares(held, number, backward=is_backward)
            total = sum(share.entry + segments[share.segment].saved * share.whole + share.region for share in shares)
            assert total == moment.saved, (segment, is_backward)
