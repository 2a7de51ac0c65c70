"""Paths in options and reports are those of the user's own model, whatever calls it and whatever is around it."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import Gelu
from torch import nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.survey import survey, wishes

OPTIONS = {"min_bytes": 0, "inner": "eager"}
X, Y = torch.randn(2, 8, 32), torch.randint(120, (2, 8))
HELD: dict = {}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Gelu()

    def forward(self, x):
        return x + self.mlp(x)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class LM(nn.Module):
    """Returns the loss and the logits."""

    def __init__(self):
        super().__init__()
        self.model, self.lm_head = Body(), nn.Linear(32, 120)

    def forward(self, x, y):
        logits = self.lm_head(self.model(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten()), logits


class Wrapper(nn.Module):
    """Hands everything to the module inside, under any name."""

    def __init__(self, inner, name):
        super().__init__()
        setattr(self, name, inner)
        self.name = name

    def forward(self, *args):
        return getattr(self, self.name)(*args)

    def step(self, x, y):
        return self.forward(x, y)[0]


class Trainer:
    def __init__(self, model):
        self.model = model

    def step(self, x, y):
        return self.model(x, y)[0]


def in_place(model, compiling):
    model.compile(**compiling)
    return model


def called(model, compiling):
    return torch.compile(lambda x, y: model(x, y)[0], **compiling)


def argument(model, compiling):
    return torch.compile(functools.partial(lambda model, x, y: model(x, y)[0], model), **compiling)


def of_a_global(model, compiling):
    HELD["policy"] = [model]
    return torch.compile(lambda x, y: HELD["policy"][0](x, y), **compiling)


def by_parts(model, compiling):
    return torch.compile(
        lambda x, y: F.cross_entropy(model.lm_head(model.model(x)).flatten(0, 1), y.flatten()), **compiling
    )


CALLS = {
    "torch.compile": lambda model, compiling: torch.compile(model, **compiling),
    "in place": in_place,
    "bound forward": lambda model, compiling: torch.compile(model.forward, **compiling),
    "closure": called,
    "partial": argument,
    "global": of_a_global,
    "method of an object": lambda model, compiling: torch.compile(Trainer(model).step, **compiling),
    "attribute of an object": lambda model, compiling: called(SimpleNamespace(model=model).model, compiling),
    "by parts": by_parts,
    "compiled once more": lambda model, compiling: called(torch.compile(model, **compiling), compiling),
}
WRAPPED = {
    "method of a module": lambda model, compiling: torch.compile(Wrapper(model, "model").step, **compiling),
    "two wrappers": lambda model, compiling: torch.compile(Wrapper(Wrapper(model, "model"), "base"), **compiling),
    "called wrapper": lambda model, compiling: called(Wrapper(model, "module"), compiling),
}
MODULES = {"model.layers.1.mlp": False, "model.layers.0.mlp": {"num_chunks": 2}, "lm_head": {"num_chunks": 3}}


def told(call, modules):
    torch._dynamo.reset()
    before = len(mst_fx.reports())
    call(LM(), {"backend": "mst_fx", "options": {**OPTIONS, "modules": modules}})(X, Y)
    (report,) = mst_fx.reports()[before:]
    return report


@pytest.mark.parametrize("name", CALLS)
def test_paths_are_those_of_the_model(name):
    report = told(CALLS[name], MODULES)
    assert {(region.module, region.chunks) for region in report.regions} == {("model.layers.0.mlp", 2), ("lm_head", 3)}
    assert [refusal.module for refusal in report.refusals] == ["model.layers.1.mlp"]
    assert report.notes == ()


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("written", [False, True])
def test_wrappers_may_be_written_or_left_out(name, written):
    report = told(WRAPPED[name], {"*.layers.1.mlp": False, "*.layers.0.mlp": False})
    path = next(region.module for region in report.regions)
    assert path.endswith(".lm_head")
    report = told(WRAPPED[name], {path: {"num_chunks": 3}} if written else MODULES)
    assert [region.chunks for region in report.regions if region.module == path] == [3]
    assert report.notes == ()


def test_a_layer_that_is_compiled_by_itself(monkeypatch, caplog):
    monkeypatch.setattr(wishes, "_warned", set())
    torch._dynamo.reset()
    model, before = LM(), len(mst_fx.reports())
    for layer in model.model.layers:
        layer.compile(backend="mst_fx", options={**OPTIONS, "modules": {"*.mlp": {"num_chunks": 2}, **MODULES}})
    model(X, Y)
    regions = [region for report in mst_fx.reports()[before:] for region in report.regions]
    assert {(region.module, region.chunks) for region in regions} == {("mlp", 2)}
    assert "'model.layers.1.mlp' matches no module of this graph; there is 'mlp'" in caplog.text


def test_a_part_behind_a_graph_break():
    class Broken(LM):
        def forward(self, x, y):
            torch._dynamo.graph_break()
            return super().forward(x, y)

    class Apart(LM):
        def forward(self, x, y):
            with torch.profiler.record_function("apart"):
                torch._dynamo.graph_break()  # in a block: nothing of this function is captured, only what it calls
                return super().forward(x, y)

    for kind in (Broken, Apart):
        torch._dynamo.reset()
        before = len(mst_fx.reports())
        torch.compile(kind(), backend="mst_fx", options={**OPTIONS, "modules": MODULES})(X, Y)
        regions = [region for report in mst_fx.reports()[before:] for region in report.regions]
        assert ("mlp", 2) in {(region.module.split(".")[-1], region.chunks) for region in regions}
        assert "1" not in {name for region in regions for name in region.module.split(".")}


def test_dropped_logits_and_cuts_have_the_path_of_the_projection():
    torch._dynamo.reset()
    report = mst_fx.explain(LM(), X, Y, options={**OPTIONS, "returned_logits": "drop"})
    assert [entry.module for entry in (*report.dropped, *report.cuts)] == ["lm_head", "lm_head"]


@pytest.mark.parametrize("options", [{"min_bytes": 2**40}, {"modules": {"lm_head": False}}])
def test_refused_heads_have_the_path_of_the_projection(options):
    torch._dynamo.reset()
    report = mst_fx.explain(lambda *batch: LM()(*batch)[0], X, Y, options={**OPTIONS, **options})
    assert "lm_head" in [refusal.module for refusal in report.refusals]


def test_regions_that_fail_have_the_path_of_their_projections(monkeypatch):
    def fails(*_, **__):
        raise KeyError

    monkeypatch.setattr(survey, "analysed", fails)
    report = mst_fx.explain(LM(), X, Y, options=OPTIONS)
    assert {refusal.module for refusal in report.refusals} == {*MODULES}
