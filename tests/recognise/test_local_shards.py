"""Graphs on DTensors: ops on shards in place of those that loops take, all others as they were; reports tell why."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from graphs import captured
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
from mst_fx.core.torch_private.collectives import is_collective
from mst_fx.core.values import is_sharded, tensors_of
from mst_fx.engine import Engine
from mst_fx.ops.shards import OnDTensors, crosses, enter, leave
from mst_fx.recognise import local_shards
from mst_fx.recognise.contractions import RANKS
from mst_fx.recognise.local_shards import localised
from mst_fx.recognise.pattern import patterns
from mst_fx.recognise.rebuild import LOCAL
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
    whole = {
        key for node in localised(gm, gm, TOP, (), {}).graph.nodes for key in node.meta.get(LOCAL, ()) if "whole" in key
    }
    copy = localised(gm, gm, TOP, whole, {})
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
    model = parallelize_module(nn.ModuleList([Gated(), Head(65)]).double(), mesh, plan)
    gm = captured(lambda x, labels: model[1](model[0](x), labels), tokens(), labels())
    report = engine(gm).rewritten().report
    assert [region.pattern for region in report.regions] == ["gated_mlp"]
    told = [refusal.text for refusal in report.refusals]
    assert any("torch.nn.functional.linear works on DTensors and has shards of unlike sizes" in text for text in told)


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
    def __init__(self, classes=64):
        super().__init__()
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, classes, bias=False)

    def forward(self, x, labels):
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def labels():
    return torch.randint(0, 64, (2, TOKENS))


def head_graph(mesh, layout, classes=64, **options):
    model = parallelize_module(
        Head(classes).double(), mesh, {"head": ColwiseParallel(output_layouts=layout, **options)}
    )
    return captured(model, tokens(), labels())


COLLECTIVES = {
    Replicate(): ["all_gather_into_tensor"],
    Shard(-1): [
        "all_reduce",
        "all_reduce",
        "all_reduce",
    ],  # the largest logit, the sum of exponentials, the picked logit
}


@pytest.mark.parametrize("layout", COLLECTIVES)
def test_a_head_holds_the_collectives_of_its_mini_sequence(mesh, layout):
    """They are in the loop, and none outside; no DTensor is there, and nothing else has changed."""
    with loss_parallel():
        gm = head_graph(mesh, layout, use_local_output=layout.is_replicate())
        rewritten = engine(gm, verify=True).rewritten()
    (site,), (region,) = rewritten.sites, rewritten.report.regions
    assert (site.pattern, site.work.backward, region.verified) == ("head", "in_forward", True)
    assert site.work.communicates
    found = [node.target._opname for node in site.work.stages.loop if is_collective(node.target)]
    assert [name for name in found if name != "wait_tensor"] == COLLECTIVES[layout]
    assert not any(isinstance(node.target, OnDTensors) for node in rewritten.module.graph.nodes)
    assert not rewritten.report.refusals


@pytest.mark.parametrize("layout", [Replicate(), Shard(-1)])
def test_a_vocabulary_that_ranks_share_unevenly_is_refused(mesh, layout):
    """Each rank would have a graph of its own, and might choose other mini-sequences."""
    with loss_parallel():
        report = engine(head_graph(mesh, layout, 65, use_local_output=layout.is_replicate())).rewritten().report
    assert not report.regions
    told = [refusal.text for refusal in report.refusals]
    assert told
    assert [text for text in told if "has shards of unlike sizes" not in text] == []


def test_a_loss_over_returned_logits_is_looped_behind_what_gathers_them(mesh):
    model = parallelize_module(Head().double(), mesh, {"head": ColwiseParallel(output_layouts=Replicate())})

    def step(x, labels):
        logits = model.head(model.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    gm = captured(step, tokens(), labels())
    rewritten = engine(gm).rewritten()
    assert [(site.pattern, site.work.communicates) for site in rewritten.sites] == [("head", False)]
    (gathers,) = (node for node in rewritten.module.graph.nodes if isinstance(node.target, OnDTensors))
    assert "redistribute" in op_name(gathers)
    whole = engine(gm, returned_logits="drop").rewritten()
    assert [(site.pattern, site.work.communicates) for site in whole.sites] == [("head", True)]


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
