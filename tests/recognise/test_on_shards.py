"""A node on DTensors runs on shards where it does the same there, forward and backward: found by a trace."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured
from sharded import attend_on_shards
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from mst_fx.core.modes import TOP
from mst_fx.recognise.on_shards import OnShards, likeness_on_shards, on_shards

WHOLE, SUM = Replicate(), Partial()


@pytest.fixture(scope="module", autouse=True)
def mesh():
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    attend_on_shards()
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def spread(mesh, placement, *shape, dtype=torch.float64):
    """A DTensor of a shape, as it is as a whole."""
    local = list(shape)
    if isinstance(placement, Shard):
        local[placement.dim] //= 2
    if dtype == torch.int64:
        return DTensor.from_local(torch.zeros(local, dtype=dtype), mesh, [placement], run_check=False)
    leaf = torch.randn(local, dtype=dtype, requires_grad=True)
    return DTensor.from_local(leaf, mesh, [placement], run_check=False)


def outcome(function, *given, last=-1):
    """What the last call in the graph of a function does on shards."""
    graph = captured(function, *given)
    calls = [node for node in graph.graph.nodes if node.op.startswith("call_")]
    return on_shards(graph, calls[last], TOP)


RUNS = {
    "columns": (F.linear, [(WHOLE, 4, 6, 8), (Shard(0), 16, 8)], [SUM, Shard(0)], (1, 1), 2),
    "columns and a bias": (
        F.linear,
        [(WHOLE, 4, 6, 8), (Shard(0), 16, 8), (Shard(0), 16)],
        [SUM, Shard(0), Shard(0)],
        (1, 1, 1),
        2,
    ),
    "rows": (F.linear, [(Shard(2), 4, 6, 8), (Shard(1), 16, 8)], [Shard(2), Shard(1)], (1, 1), 1),
    "rows and a bias": (
        F.linear,
        [(Shard(2), 4, 6, 8), (Shard(1), 16, 8), (WHOLE, 16)],
        [Shard(2), Shard(1), WHOLE],
        (1, 1, 2),
        1,
    ),
    "all whole": (F.linear, [(WHOLE, 4, 6, 8), (WHOLE, 16, 8)], [WHOLE, WHOLE], (1, 1), 1),
    "parts of a batch": (F.linear, [(Shard(0), 4, 6, 8), (WHOLE, 16, 8)], [Shard(0), SUM], (1, 1), 2),
    "elementwise": (torch.mul, [(Shard(2), 4, 6, 8), (Shard(2), 4, 6, 8)], [Shard(2), Shard(2)], (1, 1), 2),
    "attention without dropout": (
        F.scaled_dot_product_attention,
        [(Shard(1), 2, 4, 6, 8)] * 3,
        [Shard(1)] * 3,
        (1, 1, 1),
        2,
    ),
    "a norm of whole tokens": (
        lambda x, w: F.rms_norm(x, (8,), w),
        [(Shard(1), 4, 6, 8), (WHOLE, 8)],
        [Shard(1), SUM],
        (1, 1),
        2,
    ),
    "softmax of whole rows": (lambda x: x.softmax(-1), [(Shard(1), 4, 6, 8)], [Shard(1)], (1,), 2),
    "a view beside the parts": (lambda x: x.flatten(0, 1), [(Shard(2), 4, 6, 8)], [Shard(2)], (1,), 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_runs_on_shards(mesh, name):
    """With the placements of the gradients that the op itself gives."""
    function, operands, grads, shares, ranks = RUNS[name]
    found = outcome(function, *(spread(mesh, placement, *shape) for placement, *shape in operands))
    assert found == OnShards(False, tuple((grad,) for grad in grads), shares, ranks)


WHOLE_ALONE = {
    "a collective": (lambda x: x.redistribute(placements=[WHOLE]), Shard(2), "communicates (all_gather"),
    "a nonlinear op on what is to be summed": (lambda x: x.relu(), SUM, "communicates (all_reduce"),
    "sizes of the whole": (lambda x: x.view(4, 6, 4, 2), Shard(2), "something else than on the whole"),
    "a plain value": (lambda x: x.full_tensor(), Shard(1), "communicates (all_gather"),
}


@pytest.mark.parametrize("name", WHOLE_ALONE)
def test_what_runs_on_dtensors_that_are_made_of_shards(mesh, name):
    """It is a function of the shards: their gradients are placed as the shards are."""
    function, placement, why = WHOLE_ALONE[name]
    found = outcome(function, spread(mesh, placement, 4, 6, 8))
    assert why in found.why_whole
    assert found.grads == ((WHOLE if placement == SUM else placement,),)


STAYS = {
    "a mean over parts": (lambda x: x.mean(-1), Shard(2), "reduced by other means"),
    "a sum whose gradient is as wide as the whole": (lambda x: x.sum(-1), Shard(2), "something else than on the whole"),
    "softmax over parts": (lambda x: x.softmax(-1), Shard(2), "communicates (all_gather"),
    "random numbers": (lambda x: F.dropout(x, 0.5), Shard(2), "draws random numbers"),
    "a write": (lambda x: (x * 2).add_(1), Shard(2), "writes in place"),
    "several values": (lambda x: x.unbind(0)[0] * 2, Shard(2), "gives several values"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_on_dtensors(mesh, name):
    function, placement, why = STAYS[name]
    given = spread(mesh, placement, 4, 6, 8)
    graph = captured(function, given)
    calls = [node for node in graph.graph.nodes if node.op.startswith("call_")]
    found = [on_shards(graph, node, TOP) for node in calls]
    assert any(isinstance(each, str) and why in each for each in found), found


def test_shards_of_unlike_sizes_stay(mesh):
    """Each rank would have a graph and a plan of its own."""
    local = torch.randn(4, 6, 4, dtype=torch.float64, requires_grad=True)
    given = DTensor.from_local(local, mesh, [Shard(2)], run_check=False, shape=torch.Size([4, 6, 7]), stride=(42, 7, 1))
    assert "has shards of unlike sizes" in outcome(F.silu, given)


def test_what_moves_computes_nothing(mesh):
    def moves(x):
        sharded = DTensor.from_local(x, mesh, [Shard(-1)], run_check=False)
        return sharded.redistribute(placements=[Shard(-1)]).to_local()

    graph = captured(moves, torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True))
    calls = [node for node in graph.graph.nodes if node.op.startswith("call_")]
    found = [on_shards(graph, node, TOP) for node in calls]
    assert [each.moves for each in found] == [True, True, True]
    assert [each.grads for each in found] == [(), ((Shard(2),),), ((Shard(2),),)]


def test_a_detached_value_is_no_move(mesh):
    assert not outcome(lambda x: x.detach(), spread(mesh, Shard(2), 4, 6, 8)).moves


def test_gradients_that_the_user_places_are_seen(mesh):
    x = spread(mesh, WHOLE, 4, 6, 8)
    assert outcome(lambda x: x.to_local(grad_placements=[SUM]), x).grads == ((SUM,),)


def test_nodes_are_alike_only_on_the_same_placements(mesh):
    def keys(*placements):
        graph = captured(lambda *xs: [x * 2 for x in xs], *(spread(mesh, each, 4, 6, 8) for each in placements))
        return [likeness_on_shards(node, TOP) for node in graph.graph.nodes if node.op == "call_function"]

    first, second, third = keys(WHOLE, WHOLE, SUM)
    assert first == second
    assert first != third


def test_no_fake_mask_stays_in_the_cache_of_torch(mesh):
    """A mask in a placement is kept by torch for the whole process: a fake one would fail every later call."""
    table = spread(mesh, Shard(0), 10, 8)
    ids = spread(mesh, WHOLE, 8, 3, dtype=torch.int64)

    def masks():
        found = [each for each in gc.get_objects() if type(each).__name__ == "MaskBuffer"]
        return [each for each in found if isinstance(each.data, FakeTensor)]

    before = len(masks())
    why = outcome(lambda ids, table: F.embedding(ids, table).redistribute(placements=[WHOLE]), ids, table, last=-2)
    assert "_MaskPartial" in why
    assert len(masks()) == before
    for _ in range(2):
        F.embedding(ids, table).redistribute(placements=[WHOLE])
