"""Graphs on DTensors: ops on shards in place of those that loops take, all others as they were; reports tell why."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from graphs import captured
from numerics import relative_error
from sharded import HIDDEN, OPTIONS, PROGRAMS, TOKENS, Gated, parallel, styles
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.fx import GraphModule
from torch.testing._internal.distributed.fake_pg import FakeStore

import mst_fx
from mst_fx.core.modes import TOP
from mst_fx.core.provenance import op_name
from mst_fx.core.torch_private import inductor
from mst_fx.core.values import is_sharded, tensors_of
from mst_fx.engine import Engine
from mst_fx.ops.shards import crosses, enter, leave
from mst_fx.recognise import local_shards
from mst_fx.recognise.contractions import RANKS
from mst_fx.recognise.local_shards import localised
from mst_fx.recognise.pattern import patterns
from mst_fx.survey import change


@pytest.fixture(params=[2])
def mesh(request):
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield init_device_mesh("cpu", (request.param,))
    dist.destroy_process_group()


def tokens(mesh=None, placement=None):
    x = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    return x if placement is None else DTensor.from_local(x, mesh, [placement], run_check=False)


def graph_of(name, mesh):
    program = PROGRAMS[name]
    model = parallel(program.make().double(), mesh, program)
    return captured(model, tokens(mesh, Replicate()) if program.sharded else tokens())


def engine(gm, **options):
    return Engine(gm, mst_fx.Config(**{"min_bytes": 0, "num_chunks": 4, "strict": True, **options}), patterns())


def calls(gm, *targets):
    return [node for node in gm.graph.nodes if node.target in targets]


def on_dtensors(gm):
    """The ops on DTensors that compute something, by name."""
    found = [node for node in gm.graph.nodes if node.op.startswith("call_") and not crosses(node.target)]
    return [op_name(node) for node in found if any(is_sharded(x) for x in tensors_of(node))]


def test_shards_enter_and_leave_at_the_borders_alone(mesh):
    gm = graph_of("dtensors", mesh)
    copy = localised(gm, gm, TOP, (), {})
    assert [node.args[1:] for node in calls(copy, enter)] == [
        ((Partial(),),),  # the tokens, once for both projections
        ((Shard(0),),),
        ((Shard(0),),),
        ((Shard(0),),),
        ((Shard(1),),),
        ((Replicate(),), 2),  # the bias, of which each of two ranks adds a half
    ]
    (left,) = calls(copy, leave)
    assert left.args[2] == (Partial(),)
    (name,) = on_dtensors(copy)
    assert "redistribute" in name
    assert [node.meta[RANKS] for node in calls(copy, F.silu)] == [2]


def test_a_value_with_two_kinds_of_readers_is_entered_once_for_each(mesh):
    """Of `y = x * 2`, the projections give sums of gradients, and `y * y` whole ones."""
    gm = graph_of("twice", mesh)
    copy = localised(gm, gm, TOP, (), {})
    double = next(node for node in copy.graph.nodes if op_name(node) == "operator.mul")
    whole = next(user for user in double.users if user.target is leave)
    assert [user.args[1] for user in whole.users if user.target is enter] == [(Partial(),)]
    assert any(user.args[:2] == (double, double) for user in double.users)


def test_what_no_loop_takes_stays_on_dtensors(mesh):
    rewritten = engine(graph_of("sequence", mesh)).rewritten()
    assert [site.pattern for site in rewritten.sites] == ["gated_mlp"]
    assert "torch.rms_norm" in on_dtensors(rewritten.module)
    assert not any("linear" in name for name in on_dtensors(rewritten.module))
    assert not rewritten.report.refusals


def test_a_graph_without_loops_stays_as_it_was(mesh):
    gm = graph_of("gated", mesh)
    assert engine(gm, min_bytes=2**30).rewritten().module is gm


def test_a_graph_without_dtensors_is_not_looked_at(mesh, monkeypatch):
    monkeypatch.setattr(local_shards, "on_shards", None)
    monkeypatch.setattr(local_shards, "rebuilt", None)
    gm = captured(Gated().double(), tokens())
    assert localised(gm, gm, TOP, (), {}) is None
    assert len(engine(gm).rewritten().sites) == 1


def test_a_torch_without_dtensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", None)  # to import it is an error
    gm = captured(Gated().double(), tokens())
    assert len(engine(gm).rewritten().sites) == 1


def test_what_has_to_stay_is_told_beside_the_loops(mesh):
    """The head runs on DTensors in the end, as no loop takes it; the report still says why."""
    plan = {**styles("0."), "1.head": ColwiseParallel(output_layouts=Replicate())}
    model = parallelize_module(nn.ModuleList([Gated(), Head()]).double(), mesh, plan)
    gm = captured(lambda x, labels: model[1](model[0](x), labels), tokens(), labels())
    report = engine(gm).rewritten().report
    assert [region.pattern for region in report.regions] == ["gated_mlp"]
    (refusal,) = report.refusals
    assert refusal.pattern == "head"
    assert "communicates (all_gather" in refusal.text


def test_nodes_that_are_alike_are_tried_once(mesh, monkeypatch):
    tried = []
    own = local_shards.on_shards
    monkeypatch.setattr(local_shards, "on_shards", lambda gm, node, mode: tried.append(node) or own(gm, node, mode))
    model = nn.Sequential(*(parallelize_module(Gated().double(), mesh, styles()) for _ in range(3)))
    assert len(engine(captured(model, tokens())).rewritten().sites) == 3
    assert len(tried) < 0.5 * len(engine(graph_of("gated", mesh)).gm.graph.nodes) * 3


@pytest.mark.parametrize("mesh", [8], indirect=True)
def test_an_mlp_is_wide_as_a_whole(mesh):
    """A rank has 8 of 64 features, and the tokens have 16."""
    for name in ("gated", "dtensors", "plain"):
        (site,) = engine(graph_of(name, mesh)).rewritten().sites
        assert site.work.stages.length == TOKENS


def test_memory_that_is_written_to_stays(mesh):
    class Written(Gated):
        def forward(self, x):
            hidden = self.gate(x)
            hidden.mul_(2)
            return self.down(F.silu(hidden) * self.up(x))

    model = parallelize_module(Written().double(), mesh, styles(use_local_output=False))
    gm = captured(model, tokens(mesh, Replicate()))
    assert "shares memory that is written to" in str(engine(gm).rewritten().report)


def test_an_error_on_shards_costs_them_alone(mesh, monkeypatch, caplog):
    def broken(*_):
        raise KeyError("broken")

    monkeypatch.setattr(change, "localised", broken)
    model, other = parallelize_module(Gated().double(), mesh, styles()), Gated().double()
    gm = captured(lambda x: model(x) + other(x), tokens())
    with caplog.at_level(logging.WARNING, "mst_fx"):
        rewritten = engine(gm, strict=False).rewritten()
    assert len(rewritten.sites) == 1
    assert "KeyError" in caplog.text
    assert {refusal.reason for refusal in rewritten.report.refusals} == {"INTERNAL", "SHARDED"}


def test_products_that_inductor_joins_with_collectives_stay(mesh, monkeypatch):
    given: list[GraphModule] = []
    monkeypatch.setattr(inductor, "compile_graph", lambda gm, *_: given.append(gm) or gm)
    for joins in (True, False):
        gm = graph_of("sequence", mesh)
        mst_fx.backend(gm, [], options={"min_bytes": 0, "num_chunks": 4, "_micro_pipeline_tp": joins})
        assert bool(calls(given[-1], enter)) != joins
        assert ("_micro_pipeline_tp" in str(mst_fx.reports()[-1])) == joins


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 64, bias=False)

    def forward(self, x, labels):
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def labels():
    return torch.randint(0, 64, (2, TOKENS))


def test_a_head_that_gathers_its_logits_is_refused_by_the_collective(mesh):
    model = parallelize_module(Head().double(), mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
    (refusal,) = engine(captured(model, tokens(), labels())).rewritten().report.refusals
    assert (refusal.pattern, refusal.reason) == ("head", "SHARDED")
    assert refusal.text.endswith("redistribute works on DTensors and communicates (all_gather_into_tensor)")


def test_a_head_whose_vocabulary_is_sharded_is_refused_by_its_loss(mesh):
    """It compiles, and gives what it gives without mst_fx."""
    model = parallelize_module(Head().double(), mesh, {"head": ColwiseParallel(use_local_output=False)})
    given, told = (tokens(), labels()), len(mst_fx.reports())
    with loss_parallel():
        ours = torch.compile(model, backend="mst_fx", options={**OPTIONS, "inner": "aot_eager"})(*given)
        ours.backward()
        expected = model(*given)
    assert relative_error(ours.full_tensor(), expected.full_tensor()) < 1e-12
    refusals = [refusal for report in mst_fx.reports()[told:] for refusal in report.refusals]
    assert {refusal.reason for refusal in refusals} == {"SHARDED"}
    assert any("cross_entropy works on DTensors and communicates (all_reduce)" in each.text for each in refusals)


@pytest.mark.parametrize("dynamic", [True, None])
def test_one_compile_for_every_length(mesh, dynamic):
    model = parallelize_module(Gated().double(), mesh, styles())
    told = len(mst_fx.reports())
    compiled = torch.compile(model, backend="mst_fx", options={**OPTIONS, "inner": "aot_eager"}, dynamic=dynamic)
    torch._dynamo.reset()
    for length in (24, 40, 56):
        x = torch.randn(2, length, HIDDEN, dtype=torch.float64, requires_grad=True)
        compiled(x).sum().backward()
    assert [len(report.regions) for report in mst_fx.reports()[told:]] == [1] if dynamic else [1, 1]


def test_under_autocast(mesh):
    model = parallelize_module(Gated(), mesh, styles())

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    gm = captured(step, tokens().detach().float().requires_grad_())
    assert len(engine(gm, verify=True).rewritten().sites) == 1


@pytest.mark.slow
def test_plain_compile_takes_the_same_way_under_enable(mesh):
    model, told = parallelize_module(Gated(), mesh, styles()), len(mst_fx.reports())
    torch._dynamo.reset()
    with mst_fx.enabled(min_bytes=0, num_chunks=4, strict=True):
        torch.compile(model)(tokens().detach().float()).sum().backward()
    assert [len(report.regions) for report in mst_fx.reports()[told:]] == [1]
