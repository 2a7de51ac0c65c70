"""Which regions are looped, by the part that they are measured to have in the peak of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graphs import captured
from memory_probe import peak_bytes
from predictions import swiglu

from mst_fx.core.config import Config
from mst_fx.plan.planner import make_plans
from mst_fx.predict.time import device_of
from mst_fx.recognise.pattern import patterns
from mst_fx.survey.survey import Surveyor
from mst_fx.survey.surveyed import timeline_of

TOKENS, WIDTH, LARGE = 16384, 2, 1024


def weights(hidden):
    """Of a gated MLP with so many hidden features."""
    return [torch.randn(shape).requires_grad_() for shape in ((hidden, WIDTH), (hidden, WIDTH), (WIDTH, hidden))]


def measured(program, inputs):
    """Bytes at once in a step of eager execution, above the inputs."""
    return peak_bytes(lambda: torch.autograd.grad(program(*inputs), inputs, torch.ones(TOKENS, WIDTH)))


@pytest.mark.parametrize(("hidden", "part", "looped"), [(3, (0.002, 0.004), False), (5, (0.004, 0.008), True)])
def test_a_small_region_is_looped_beside_a_large_one(hidden, part, looped):
    """As measured, one has less than four thousandths of the peak, the other more; neither by a factor of two."""
    x, large, small = torch.randn(TOKENS, WIDTH, requires_grad=True), weights(LARGE), weights(hidden)

    def program(x, *weights):
        return swiglu(swiglu(x, *weights[:3]), *weights[3:])

    share = measured(swiglu, [x, *small]) / measured(program, [x, *large, *small])
    assert part[0] < share < part[1]
    surveyor = Surveyor(Config(min_bytes=0), patterns())
    surveyed = surveyor.survey(captured(program, x, *large, *small))
    offers = [surveyor.offer(site) for site in surveyed.all_sites()]
    # as in a step that takes 16 GB: four thousandths of that are the least that a region has to write
    offers = [replace(offer, memory=replace(offer.memory, written=2**30)) for offer in offers]
    plans = make_plans(offers, timeline_of(surveyed), device_of(torch.device("cpu")), Config())
    assert [plan.lengths is not None for plan in plans.of] == [True, looped]
