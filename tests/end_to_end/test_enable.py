"""`enable`: plain torch.compile goes through the pass, and nothing else changes.

The whole suite takes this way with MST_FX_ENABLE=1 in the environment; here are the graphs of some programs, and what
`enable` itself promises.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import losses
import pytest
import torch
import torch._inductor.config as inductor
import torch.nn.functional as F  # noqa: N812
from graphs import captured, rewritten, text
from models import NanoGPT
from numerics import assert_as_good_as_eager, gradients, relative_error
from through_inductor import through_inductor
from torch import nn
from torch._inductor.compile_fx import _recursive_pre_grad_passes
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import checkpoint

import mst_fx

OPTIONS: dict[str, Any] = {"min_bytes": 0, "chunk_tokens": 16, "strict": True}
PLACE, TIMING = "pre_grad_custom_pass", "pre_grad_pass_timing"


@pytest.fixture(autouse=True)
def _off_again():
    torch._dynamo.reset()
    yield
    mst_fx.disable()
    assert inductor.pre_grad_custom_pass is None


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 48), nn.Linear(48, 8)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def loss_of(model):
    return lambda x: model(x).square().mean()


def tokens():
    return [torch.randn(2, 48, 8)]


def new_reports(step, *inputs):
    """The reports of the first call of a function."""
    known = mst_fx.reports()
    step(*inputs)
    return [report for report in mst_fx.reports() if not any(report is other for other in known)]


def numbered(gm):
    """The graph and its subgraphs as text, with the values numbered."""
    children = [numbered(child) for _, child in gm.named_children()]
    for number, node in enumerate(gm.graph.nodes):
        node.name = f"v{number}"
    return [text(gm), *children]


def checkpointed_mlp(x, w, y):
    wide = checkpoint(lambda x: F.silu(x @ w.t()) @ w, x, use_reentrant=False)
    return wide.square().mean() + y.sum()


PROGRAMS = {
    name: program
    for group in (losses.CROSS_ENTROPY, losses.REINFORCEMENT, losses.SHIFTED, losses.PIECES, losses.CHECKPOINTED)
    for name, program in list(group.items())[:4]
} | {"checkpointed_mlp": checkpointed_mlp}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_graph_is_that_of_the_backend(name):
    """With its placeholders as Dynamo made them, and no module that it does not read."""
    inputs = torch.randn(losses.B, losses.T, losses.D), torch.randn(losses.V, losses.D, requires_grad=True)
    gm = captured(PROGRAMS[name], *inputs, torch.randint(losses.V, (losses.B, losses.T)))
    expected, report = rewritten(gm, chunk_tokens=16)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    mst_fx.enable(**OPTIONS)
    looped = _recursive_pre_grad_passes(gm, ())
    assert mst_fx.reports()[-1] == report
    assert report.regions
    assert numbered(looped) == numbered(expected)
    assert [node for node in looped.graph.nodes if node.op == "placeholder"] == placeholders
    assert {str(node.target) for node in looped.graph.nodes if node.op == "get_attr"} >= {
        *dict(looped.named_children())
    }


def test_a_model_trains_as_with_the_backend():
    model, ids = NanoGPT(), torch.randint(120, (2, 48))

    def step(m, ids):
        return m(ids, ids)

    reports = []
    for _ in range(2):
        reports.append(assert_as_good_as_eager(model, [ids], step=step, inner="aot_eager"))
        mst_fx.enable()  # the backend keeps its own options
    with through_inductor():
        reports.append(assert_as_good_as_eager(model, [ids], step=step, inner="aot_eager"))
    assert reports[0].regions
    assert reports[0] == reports[1] == reports[2]


def test_plain_compile_is_looped():
    model, inputs = Mlp(), tokens()
    eager = gradients(model, loss_of(model), inputs)
    mst_fx.enable(**OPTIONS)
    known = len(mst_fx.reports())
    ours = gradients(model, torch.compile(loss_of(model), mode="max-autotune-no-cudagraphs"), inputs)
    assert all(relative_error(ours[name], value) < 1e-5 for name, value in eager.items())
    (report,) = mst_fx.reports()[known:]
    assert [region.chunks for region in report.regions] == [6]


def test_layers_that_are_compiled_one_by_one():
    layers = nn.Sequential(Mlp(), Mlp())
    for layer in layers:
        layer.compile()
    with mst_fx.enabled(**OPTIONS), through_cheap_inductor():
        assert [len(report.regions) for report in new_reports(layers, *tokens())] == [1, 1]
    layers[0].compile(dynamic=False)
    assert not new_reports(layers[0], *tokens())


def through_cheap_inductor():
    """Inductor's passes and its plain kernels: the cheapest compile that it has."""
    return inductor.patch({"cpp.simdlen": 1})


@pytest.mark.parametrize(("disable", "chunks"), [((), [4]), (("mlp",), [])])
def test_options_of_the_backend_hold_under_enable(disable, chunks):
    """Where it loops nothing, `enable` does not loop either."""
    mst_fx.enable(min_bytes=0, num_chunks=2)
    options = {"min_bytes": 0, "num_chunks": 4, "disable": disable}
    (report,) = new_reports(torch.compile(loss_of(Mlp()), backend="mst_fx", options=options), *tokens())
    assert [region.chunks for region in report.regions] == chunks


def test_other_backends_are_left_alone():
    mst_fx.enable(**OPTIONS)
    assert not new_reports(torch.compile(loss_of(Mlp()), backend="aot_eager"), *tokens())


def test_graphs_that_dynamo_has_not_captured_are_left_alone():
    mst_fx.enable(**OPTIONS)
    assert not new_reports(_recursive_pre_grad_passes, torch.fx.symbolic_trace(Mlp()), tokens())


def test_a_graph_without_a_module_is_told(caplog):
    mst_fx.enable(**OPTIONS)
    inductor.pre_grad_custom_pass(torch.fx.Graph())
    assert "belongs to no module" in caplog.text
    assert "belongs to no module" in mst_fx.reports()[-1].refusals[0].text


class Counted(CustomGraphPass):
    """A pass of the user: it counts its calls."""

    def __init__(self, name: str | None) -> None:
        self.name, self.calls = name, 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str | None:
        return self.name


def test_passes_of_the_user_are_kept():
    one, other = Counted("one"), Counted("other")
    for theirs in (one, [one, other], (other,)):
        one.calls = other.calls = 0
        with inductor.patch({PLACE: theirs}):
            mst_fx.enable(**OPTIONS)
            mst_fx.enable(**OPTIONS, accumulate="native")  # it replaces the first
            _recursive_pre_grad_passes(captured(loss_of(Mlp()), *tokens()), ())
            mst_fx.disable()
            assert inductor.pre_grad_custom_pass is theirs
        given = theirs if isinstance(theirs, (list, tuple)) else [theirs]
        assert (one.calls, other.calls) == (one in given, other in given)


def test_a_pass_has_a_version():
    """For a user who lets it run behind Inductor's caches."""

    def version(theirs=None, **options):
        with inductor.patch({PLACE: theirs}), mst_fx.enabled(**options):
            return inductor.pre_grad_custom_pass.uuid()

    assert version() == version()
    assert version() != version(chunk_tokens=16) != version(Counted("one"), chunk_tokens=16)
    assert version(Counted(None)) is version(lambda graph: None) is None


def test_the_version_is_of_all_sources(monkeypatch):
    """The patterns, too, which may lie behind a link."""
    read, read_bytes = set(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.add(path.name) or read_bytes(path))
    mst_fx.enable()
    assert inductor.pre_grad_custom_pass.uuid()
    assert read >= {"gated_mlp.py", "head.py", "planner.py"}


def test_blocks_and_disable_put_everything_back():
    names = [name for name in (PLACE, TIMING, "unsafe_marked_cacheable_functions") if hasattr(inductor, name)]
    before = [getattr(inductor, name) for name in names]
    mst_fx.disable()
    with mst_fx.enabled(chunk_tokens=8):
        outer = inductor.pre_grad_custom_pass
        assert outer.config.chunk_tokens == 8
        with suppress(KeyError), mst_fx.enabled(chunk_tokens=16):
            assert inductor.pre_grad_custom_pass.config.chunk_tokens == 16
            raise KeyError
        assert inductor.pre_grad_custom_pass is outer
        assert getattr(inductor, TIMING, "early") == "early"
    assert [getattr(inductor, name) for name in names] == before


def test_what_cannot_work_is_told_at_once(monkeypatch):
    with pytest.raises(ValueError, match="unknown option 'chunk'"):
        mst_fx.enable(chunk=3)
    with pytest.raises(ValueError, match="no pattern is called"):
        mst_fx.enable(disable="heads")
    with pytest.raises(ValueError, match="works inside Inductor"):
        mst_fx.enable(inner="eager")
    with inductor.patch(use_pre_grad_passes=False), pytest.raises(RuntimeError, match="use_pre_grad_passes is off"):
        mst_fx.enable()
    monkeypatch.setattr("mst_fx.core.torch_private.inductor.has_option", lambda name: name != PLACE)
    with pytest.raises(RuntimeError, match="has no option 'pre_grad_custom_pass'"):
        mst_fx.enable()


def test_an_error_in_the_pass_costs_only_the_loops(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("mst_fx.engine.Engine.rewritten", broken)
    model, inputs = Mlp(), tokens()
    mst_fx.enable(min_bytes=0)
    gm = captured(loss_of(model), *inputs)
    before = text(gm)
    _recursive_pre_grad_passes(gm, ())
    assert text(gm) == before
    refusal = mst_fx.reports()[-1].refusals[0]
    assert "ZeroDivisionError" in refusal.text


def test_logits_that_are_dropped_are_told(caplog):
    def program(x, w):
        logits = x @ w
        return logits.logsumexp(-1).sum(), logits

    x, w = torch.randn(2, 40, 8, requires_grad=True), torch.randn(8, 64)
    with mst_fx.enabled(min_bytes=0, returned_logits="drop"):
        loss, logits = torch.compile(program, dynamic=False)(x, w)
    torch.testing.assert_close(loss, program(x, w)[0])
    assert logits is None
    (record,) = (record for record in caplog.records if record.name == "mst_fx" and record.levelname == "WARNING")
    assert "test_enable.py" in record.getMessage()
    assert "returned_logits='drop' is set" in record.getMessage()


def test_a_compile_that_begins_anew_has_one_report():
    """Reports of earlier compiles stay, though a reset gives Dynamo's names of compiles once more."""
    mlp = Mlp()
    counts = []
    for _ in range(2):
        torch._dynamo.reset()
        tried = []

        def inner(gm, _, tried=tried):
            tried.append(gm)
            if len(tried) == 1:
                raise torch._dynamo.exc.TensorifyScalarRestartAnalysis(restart_reason="a number is fixed")
            return gm

        with through_inductor():
            step = torch.compile(loss_of(mlp), backend="mst_fx", options={**OPTIONS, "inner": inner})
            counts.append((len(new_reports(step, *tokens())), len(mst_fx.reports())))
        assert len(tried) == 2
    assert [count for count, _ in counts] == [1, 1]
    assert counts[1][1] == counts[0][1] + 1
