"""Collectives over ranks, in chunks of tokens: where the rules accept them, each chunk meets its own tokens."""

from __future__ import annotations

import pytest
import torch
from looping import Call, placed
from torch.testing._internal.distributed.fake_pg import FakeStore

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import Split
from mst_fx.verify.by_chunks import Program, check
from mst_fx.verify.trial import Alone

RANKS = 2
collectives = torch.ops._c10d_functional
CALLS = {
    "all_reduce": (lambda call, x: call(collectives.all_reduce.default, x, "max", "0"), 17),
    "all_gather": (lambda call, x: call(collectives.all_gather_into_tensor.default, x, RANKS, "0"), 17),
    "reduce_scatter": (lambda call, x: call(collectives.reduce_scatter_tensor.default, x, "sum", RANKS, "0"), 10),
}
"""What is called, and in how many of 17 ways its operand may be split."""


@pytest.fixture(autouse=True)
def group():
    torch.distributed.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("needed", [False, True])
def test_chunk_by_chunk(name, needed):
    """With an operand that is split, or a result that is needed split; all ranks hold the same."""
    function, accepted = CALLS[name]
    with Alone():
        program = Program()
        result = function(program.call, program.input(torch.randn(12, 6, dtype=torch.float64)))
        waited = program.call(collectives.wait_tensor.default, result)
        other = program.input(waited.meta["val"].clone()) if needed else None
        program.outputs = [program.call(torch.ops.aten.stack.default, [other, waited]) if needed else waited]
        found = check(program, [other] if needed else None)
    assert found["accepted"] == accepted or (needed and found["accepted"] > 0)


def test_ranks_stand_in_front_of_the_tokens():
    def gathered(x):
        return collectives.wait_tensor(collectives.all_gather_into_tensor(x, RANKS, "0"))

    assert placed(Call(gathered, [torch.randn(12, 4)]), Split(0, 3)) == [Split(0, 6)]
    assert placed(Call(gathered, [torch.randn(12, 4)]), Split(1)) == [Split(1)]


def test_tokens_that_are_given_to_different_ranks_are_refused():
    def scattered(x):
        return collectives.wait_tensor(collectives.reduce_scatter_tensor(x, "sum", RANKS, "0"))

    with pytest.raises(Refusal) as refused:
        placed(Call(scattered, [torch.randn(12, 4)]), Split(0))
    assert refused.value.reason is Reason.AXIS_MIXED
