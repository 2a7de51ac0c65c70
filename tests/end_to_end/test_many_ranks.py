"""Data and sequence parallel training on several ranks: right, looped, and with no collective more than without."""

from __future__ import annotations

from functools import cache

import pytest
from numerics import TOLERANCE
from parallel_programs import PROGRAMS, outcomes
from ranks import on_ranks
from torch import bfloat16

outcomes_on = cache(lambda ranks: on_ranks(ranks, outcomes, limit=240))
ATTENTION = "torch.nn.functional.scaled_dot_product_attention works on DTensors and communicates"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, named in PROGRAMS.items() for name in named])
def test_a_program_is_right_and_looped(ranks, name):
    """Loss and gradients are those of one process with all tokens; the ranks have unlike numbers of labels."""
    found = outcomes_on(ranks)[name]
    for of, error in found.errors.items():
        assert error < (found.without[of] + TOLERANCE[bfloat16] if "mixed" in name else 1e-13), of
    assert {*found.regions} == {"gated_mlp", "head"}
    assert all(text.startswith(ATTENTION) for _, text in found.refusals), found.refusals
    assert not found.collectives - found.before
    assert found.collectives
