"""Sorting along the axis: each mini-sequence for itself, as long as the rows come back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looping import Call, aten_graph, indices, loop_everything, looped, placed, placeholders, values

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import PARTIAL, WHOLE, Routed, Split

aten = torch.ops.aten
N, K, E, D = 12, 2, 4, 3
X, IDS, TABLE = INPUTS = values(N, D), indices(N, K, below=E), values(E, D)


def order(ids):
    return aten.sort.default(ids.reshape(-1))[1]


def inverse(order):
    return aten.index_put.default(torch.empty_like(order), [order], torch.arange(order.shape[0]))


def there_and_back(x, ids, table):
    permutation = order(ids)
    rows = x[aten.floor_divide.default(permutation, K)] * 2
    return rows[inverse(permutation)].view(N, K, D).sum(1)


def added_back(x, ids, table):
    tokens = aten.floor_divide.default(order(ids), K)
    return aten.index_put.default(torch.zeros_like(x), [tokens], x[tokens], True)


def scattered_back(x, ids, table):
    tokens = aten.floor_divide.default(order(ids), K).unsqueeze(1).expand(-1, D)
    return aten.scatter_add.default(torch.zeros_like(x), 0, tokens, aten.gather.default(x, 0, tokens))


def twice_sorted(x, ids, table):
    permutation = order(ids)
    return x.repeat_interleave(K, 0)[permutation][aten.sort.default(permutation)[1]].view(N, K, D).sum(1)


def with_a_table(x, ids, table):
    keys, permutation = aten.sort.stable(ids.reshape(-1), stable=True)
    return (x[permutation // K] + table[keys])[inverse(permutation)].view(N, K, D).sum(1)


def counted(x, ids, table):
    return aten.histc.default(aten.sort.default(ids.reshape(-1))[0].double(), E, 0, E - 1)


PROGRAMS = [there_and_back, added_back, scattered_back, twice_sorted, with_a_table, counted]


@given(st.sampled_from(PROGRAMS), st.integers(1, N))
def test_chunk_by_chunk(program, chunk):
    module = aten_graph(Call(program, INPUTS))
    stages = loop_everything(module, placeholders(module)[1], Split(0))
    (result,) = looped(module, stages, INPUTS, chunk)
    torch.testing.assert_close(result, program(*INPUTS), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("program", PROGRAMS[:-1])
@pytest.mark.parametrize("position", [0, 1])
def test_rows_come_back(program, position):
    assert placed(Call(program, INPUTS), Split(0), position) == [Split(0)]


def test_a_total_of_sorted_rows_is_a_sum():
    assert placed(Call(lambda x, ids, table: x[order(ids) // K].sum(0), INPUTS), Split(0)) == [PARTIAL]


def test_counts_are_each_mini_sequences_own():
    (placement,) = placed(Call(counted, INPUTS), Split(0), 1)
    assert isinstance(placement, Routed)
    assert placement.kind == "counts"


def test_a_sort_along_another_dim_is_none_of_this():
    assert placed(Call(lambda ids: list(aten.sort.default(ids)), [IDS]), Split(0)) == [Split(0), Split(0)]
    assert placed(Call(lambda x, ids, table: [x + 1, order(ids)], INPUTS), Split(0)) == [Split(0), WHOLE]


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (lambda x, ids, table: x[aten.sort.default(ids.reshape(-1), 0, True)[1] // K], "the largest first"),
        (lambda x, ids, table: x[order(ids) // K].view(N, K, D), "rows in their own order"),
        (lambda x, ids, table: x[order(ids) // K] + x.repeat_interleave(K, 0), "in different orders"),
        (lambda x, ids, table: x[order(ids) // K][inverse(order(ids + 1))], "in an order of its own"),
        (lambda x, ids, table: x[order(ids) // K][inverse(order(-ids))], "in an order of its own"),
        (lambda x, ids, table: x[order(ids) // K][inverse(order(ids))], "in an order of its own"),
        (lambda x, ids, table: x[order(ids) // K] + table[aten.sort.default(ids.reshape(-1))[0]], "different orders"),
        (lambda x, ids, table: x[order(ids) // 3], "positions of the split dim"),
        (lambda x, ids, table: x[(order(ids) * 1) // K], "positions of the split dim"),
        (lambda x, ids, table: x[order(ids) // K].cumsum(0), "mixes the split dim"),
        (lambda x, ids, table: aten.sort.default((x[order(ids) // K])[:, 0])[0], "sorts sorted rows"),
        (lambda x, ids, table: aten.index_put.default(x, [order(ids) // K], x[order(ids) // K]), "writes to rows"),
    ],
)
def test_refused(program, why):
    with pytest.raises(Refusal) as refused:
        placed(Call(program, INPUTS), Split(0), 1)
    assert refused.value.reason is Reason.AXIS_MIXED
    assert why in refused.value.text
