"""Regions that are alike are analysed once, and run the same bodies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured
from models import D, SwiGLU, V, tokens
from numerics import gradients, looped, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from mst_fx.bodies import call, work
from mst_fx.capture import lower
from mst_fx.core.config import Config
from mst_fx.core.sizes import LONG, hint, long_hint
from mst_fx.pipeline import rewrite
from mst_fx.plan.chunk_length import Lengths
from mst_fx.recognise.pattern import patterns
from mst_fx.runtime import loop_operator
from mst_fx.survey.survey import Surveyor
from mst_fx.survey.surveyed import timeline_of


class Layers(nn.Module):
    """MLPs of the given widths, one behind the other, and a head."""

    def __init__(self, *widths: int, again: bool = False) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.mlps = nn.ModuleList(SwiGLU(f=width) for width in widths)
        self.again = again

    def forward(self, ids, labels):
        x = self.tokens(ids)
        for mlp in self.mlps:
            y = F.rms_norm(x, (D,))
            x = x + (checkpoint(mlp, y, use_reentrant=False) if self.again else mlp(y))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.fixture(autouse=True)
def _reset():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("widths", "kinds"), [((128,), 2), ((128,) * 6, 2), ((128, 256, 128, 256), 3)])
def test_regions_that_are_alike_are_traced_once(monkeypatch, widths, kinds, again):
    calls = {"lower": 0, "gradient_body": 0}

    def counting(module, name):
        function = getattr(module, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    counting(work, "lower")
    counting(call, "gradient_body")
    gm = captured(Layers(*widths, again=again), *tokens(2, 64))
    _, report = rewrite(gm, Config(min_bytes=0, chunk_tokens=32), patterns())
    assert len(report.regions) == len(widths) + 1
    assert calls == {"lower": kinds, "gradient_body": kinds}


def test_eight_layers_that_are_alike_are_traced_as_two_are(monkeypatch):
    ops, make_fx = list[int](), lower.make_fx

    def counting(function, **how):
        def traced(*examples):
            module = make_fx(function, **how)(*examples)
            ops.append(len(module.graph.nodes))
            return module

        return traced

    monkeypatch.setattr(lower, "make_fx", counting)
    counts = []
    for layers in (2, 8):
        ops.clear()
        planned(captured(Layers(*[128] * layers), *tokens(2, 64)), chunk_tokens=32)
        counts.append([*ops])
    assert counts[0] == counts[1] != []


def test_a_body_for_any_length_is_traced_once_and_only_for_a_loop(monkeypatch):
    lengths, gradient_body = [], call.gradient_body

    def noting(stages, gradients, length, **how):
        lengths.append(length)
        return gradient_body(stages, gradients, length, **how)

    monkeypatch.setattr(call, "gradient_body", noting)
    ids, labels = tokens(1, 64)
    torch._dynamo.mark_dynamic(ids, 1)
    torch._dynamo.mark_dynamic(labels, 1)
    surveyor = Surveyor(Config(min_bytes=0, chunk_tokens=32), patterns())
    mlp, head = surveyor.survey(captured(Layers(128), ids, labels)).all_sites()
    surveyor.offer(mlp)
    surveyor.offer(head)
    assert lengths == [32, 32]
    for chunk in (32, 16):
        surveyor.call(mlp.work, Lengths(chunk, chunk))
    assert lengths == [32, 32, None, 16]


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_generated_code_holds_one_body_a_kind(again):
    from torch._inductor.utils import run_and_get_code

    model = Layers(128, 128, 128, again=again)
    batch = tokens(2, 64)
    eager = gradients(model, model, batch)
    compiled = looped(model, inner="inductor", chunk_tokens=32)
    ours, codes = run_and_get_code(gradients, model, compiled, batch)
    for name, value in eager.items():
        assert relative_error(ours[name], value) < 1e-5, name
    forward, backward = (code.count("def mini_sequence_body") for code in codes)
    assert forward == 2  # head and MLP
    assert backward == 1 + again  # gradients of the MLP; in a block the MLP itself, too
    assert sum(code.count("= run_loop(") for code in codes) == 7 + again


def test_bodies_are_run_on_fakes_no_more_often_for_more_layers(monkeypatch):
    values, Like = [], loop_operator._Like
    monkeypatch.setattr(loop_operator, "_Like", lambda *known: values.append(known) or Like(*known))
    counts = []
    for layers in (2, 6):
        values.clear()
        torch._dynamo.reset()
        looped(Layers(*[128] * layers), chunk_tokens=32, inner="aot_eager")(*tokens(2, 64)).backward()
        counts.append(len(values))
    assert counts[0] == counts[1] > 0


def test_blocks_that_are_computed_again_save_nothing_but_their_inputs():
    batch = tokens(2, 64)
    peaks = []
    for again in (False, True):
        surveyor = Surveyor(
            Config(min_bytes=0, chunk_tokens=32, disable=("gated_mlp",)), patterns(("gated_mlp", "mlp"))
        )
        surveyed = surveyor.survey(captured(Layers(1024, 1024, 1024, again=again), *batch))
        timeline = timeline_of(surveyed)
        assert any(segment.block is not None for segment in timeline.segments) == again
        peaks.append(sum(segment.saved for segment in timeline.segments if segment.block is None))
    wide = 2 * 64 * 1024 * 4
    assert peaks[0] - peaks[1] >= 3 * 2 * wide


def planned(gm, **options):
    return rewrite(gm, Config(min_bytes=0, **options), patterns())[1]


def test_a_budget_loops_layer_by_layer():
    gm = captured(Layers(1024, 1024, 1024, 1024), *tokens(2, 64))
    generous, least = planned(gm, memory_budget="1TiB"), planned(gm, memory_budget=1)
    assert [region.pattern for region in generous.regions] == ["head"]
    assert {refusal.reason for refusal in generous.refusals} == {"SMALL"}
    assert len(least.regions) > 1
    between = planned(gm, memory_budget=(generous.peak + planned(gm).peak) // 2)
    assert planned(gm).peak < between.peak < generous.peak
    assert 1 < len(between.regions) < 5


def test_a_budget_that_is_missed_is_told(caplog):
    gm = captured(Layers(1024), *tokens(2, 64))
    report = planned(gm, memory_budget="1KiB")
    assert report.refusals[-1].reason == "BUDGET"
    assert "1.0 KiB allowed, the least is" in report.refusals[-1].text
    assert "memory_budget missed: 1.0 KiB allowed" in caplog.text
    assert "what would help: " in caplog.text
    assert "\nmemory_budget missed: 1.0 KiB allowed, the least is " in str(report)
    assert "\nchange first: " in str(report)
    assert "left alone (BUDGET)" not in str(report)
    assert all(line.strip() for line in str(report).splitlines())


def test_modules_are_named_by_their_paths():
    gm = captured(Layers(128, 128, 128), *tokens(2, 64))
    wishes = {"mlps.0": False, "mlps.1.*": {"num_chunks": 4}, "mlps.*": {"num_chunks": 2}}
    report = planned(gm, modules=wishes)
    assert [region.chunks for region in report.regions if region.pattern == "gated_mlp"] == [4, 2]
    assert [refusal.text for refusal in report.refusals] == ["the option `modules` says so"]
    report = planned(gm, modules={"head": False})
    assert [region.pattern for region in report.regions] == ["gated_mlp"] * 3


def test_by_default_small_programs_are_left_as_they_are():
    gm = captured(Layers(128), *tokens(2, 64))
    rewritten, report = rewrite(gm, Config(), patterns())
    assert rewritten is gm
    assert {refusal.reason for refusal in report.refusals} == {"SMALL"}


@pytest.mark.parametrize("again", [False, True])
def test_a_length_that_varies_is_judged_as_the_long_one_would_be(again):
    """Every number that a plan is made of, at the length that `long_hint` assumes, is that of a capture at it."""
    numbers = []
    for length, at in ((8, long_hint), (LONG, hint)):
        model, (ids, labels) = Layers(1024, 1024, again=again), tokens(1, length)
        for tensor in (ids, labels) if length < LONG else ():
            torch._dynamo.mark_dynamic(tensor, 1)
        surveyor = Surveyor(Config(chunk_tokens=1024), patterns())
        surveyed = surveyor.survey(captured(model, ids, labels))
        offers = [surveyor.offer(site, at) for site in surveyed.all_sites()]
        extents = [replace(offer.extent, dynamic=False) for offer in offers]
        numbers.append(([(offer.memory, offer.cost) for offer in offers], extents, timeline_of(surveyed, at)))
    assert numbers[0] == numbers[1]
    assert len(numbers[0][0]) == 3
