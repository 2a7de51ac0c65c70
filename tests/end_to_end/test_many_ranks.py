"""Data and sequence parallel training on several ranks: right, looped, and with no collective more than without."""

from __future__ import annotations

import pytest
from numerics import TOLERANCE
from parallel import GROUPS, TOKENS, D, Outcome
from parallel_programs import PROGRAMS, outcomes
from ranks import on_ranks
from torch import bfloat16

EXCHANGES = "gloo:all_to_all"
EVERYTHING = {"attention", "gated_mlp", "head"}
LOOPED = {
    "ddp, static graph, other lengths on each rank": {"gated_mlp", "head"},  # in one group: such a compile takes long
    "context parallel": {"gated_mlp", "head"},
    "pipeline": {"attention", "gated_mlp"},  # the head is on another rank
}
"""What is looped on the first rank, where it is not everything."""
TOLD = (
    "torch.nn.functional.scaled_dot_product_attention works on DTensors and communicates",
    "no checkpointed block of this graph keeps a value for backward",
)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", PROGRAMS)
def test_programs_are_right_and_looped(ranks):
    """Loss and gradients are those of one process with all tokens; the ranks have unlike numbers of labels."""
    for name, found in on_ranks(ranks, outcomes, limit=480).items():
        for of, error in found.errors.items():
            assert error < (found.without[of] + TOLERANCE[bfloat16] if "mixed" in name else 1e-13), (name, of)
        assert {*found.regions} == LOOPED.get(name, EVERYTHING), name
        assert all(text.startswith(TOLD) for _, text in found.refusals), (name, found.refusals)
        assert found.offloaded == ([2 * TOKENS * D * 8] if "to the host" in name else []), name
        assert found.collectives, name
        more = found.collectives - found.before
        if "ulysses" in name:
            assert more.pop(EXCHANGES)
            assert found.collectives[EXCHANGES] == _exchanges(found, checkpointed="fsdp" in name), name
        assert not more, name


def _exchanges(found: Outcome, *, checkpointed: bool) -> int:
    """How often ranks exchange heads, where each group of heads has its own exchanges.

    Four forward and four backward, and four again where a checkpoint runs the forward again. The loop in the backward
    exchanges what the forward did.
    """
    return (16 if checkpointed else 12) * GROUPS * found.regions.count("attention")
