"""Heads over a vocabulary that ranks share: loops with the collectives of a mini-sequence inside, alike on each."""

from __future__ import annotations

import pytest
from parallel_heads import CHUNKS, CLASSES, HIDDEN, PROGRAMS, TOKENS, all_of_it, outcomes
from ranks import on_ranks

REDUCED = {"all_reduce max": CHUNKS, "all_reduce sum": 2 * CHUNKS + 1}
"""The largest logit, the sum of exponentials and the picked logit of each chunk; the gradient of all tokens, once."""
GATHERED = {"all_gather_into_tensor": CHUNKS, "all_reduce sum": 1}


@pytest.fixture(scope="module")
def results():
    return on_ranks(2, all_of_it, list(PROGRAMS))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_head_is_looped_right(name, results):
    """Loss and gradients are those of one process, made in the forward; no logits are saved."""
    found = results[0][name]
    assert max(found.errors.values()) < 1e-13, found.errors
    assert found.backward == [("head", "in_forward")]
    assert not found.refusals
    assert found.verified == [True]
    assert found.collectives == (GATHERED if PROGRAMS[name].gathered else REDUCED)
    assert found.saved == 2 * TOKENS * HIDDEN < TOKENS * CLASSES


def test_ranks_that_would_choose_otherwise_run_the_same_chunks(results):
    """A budget that is large on one rank and small on the other: they would wait for one another for ever."""
    first, second = results[1]
    assert first == second > 1


@pytest.mark.slow
def test_inductor_compiles_collectives_in_bodies():
    for name, found in on_ranks(2, outcomes, ["loss parallel", "gathered"], "inductor").items():
        assert max(found.errors.values()) < 1e-13, (name, found.errors)
        assert found.backward == [("head", "in_forward")]
