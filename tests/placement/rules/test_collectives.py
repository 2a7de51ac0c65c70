"""Collectives over ranks, in chunks of tokens: where the rules accept them, each chunk meets its own tokens."""

from __future__ import annotations

import pytest
import torch
from looping import Call, placed
from torch.testing._internal.distributed.fake_pg import FakeStore

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import Split
from mst_fx.placement.rules import Spans
from mst_fx.verify.by_chunks import Program, check
from mst_fx.verify.trial import Alone

RANKS = 2
collectives = torch.ops._c10d_functional
CALLS = {
    "all_reduce": (lambda call, x: call(collectives.all_reduce.default, x, "max", "0"), 17),
    "all_gather": (lambda call, x: call(collectives.all_gather_into_tensor.default, x, RANKS, "0"), 17),
    "reduce_scatter": (lambda call, x: call(collectives.reduce_scatter_tensor.default, x, "sum", RANKS, "0"), 10),
    "all_to_all": (lambda call, x: call(collectives.all_to_all_single.default, x, [6, 6], [6, 6], "0"), 14),
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


def exchanged(x):
    half = [x.shape[0] // RANKS] * RANKS
    return collectives.wait_tensor(collectives.all_to_all_single(x, half, half, "0"))


def test_an_exchange_keeps_an_axis_within_the_parts():
    call = Call(exchanged, [torch.randn(12, 4)])
    assert placed(call, Split(0, RANKS)) == [Split(0, RANKS)]
    assert placed(call, Split(1)) == [Split(1)]
    with pytest.raises(Spans) as spans:
        placed(call, Split(0))
    assert spans.value.factors == [(RANKS, 1)]


def test_a_trial_shows_parts_in_another_order():
    with Alone():
        assert exchanged(torch.arange(4)).tolist() == [2, 3, 0, 1]


def test_exchanges_of_sorted_rows_are_refused():
    """Each chunk sorts its own rows: they are not in the parts that they are in without a loop."""
    with pytest.raises(Refusal, match="gives sorted rows to other ranks"):
        placed(Call(lambda keys: exchanged(keys.sort().values), [torch.randn(12)]), Split(0, RANKS))
