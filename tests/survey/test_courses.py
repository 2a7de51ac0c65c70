"""The timeline of a report: the numbers of the planner, with what is alive at the peaks."""

from __future__ import annotations

import pytest
import torch
from graphs import captured
from models import MlpLM, NanoGPT, tokens

import mst_fx
from mst_fx.pipeline import rewrite
from mst_fx.predict.step_memory import Moment
from mst_fx.recognise.pattern import patterns
from mst_fx.survey import courses


def report_of(model, **options) -> mst_fx.Report:
    config = mst_fx.Config(**{"min_bytes": 0, "chunk_tokens": 8, **options})
    return rewrite(captured(model, *tokens(8, 64, 0)), config, patterns())[1]


@pytest.fixture(scope="module")
def report():
    return report_of(NanoGPT(3), modules={"*blocks.1.3": False})


def test_peaks_are_those_of_the_plan(report):
    (timeline,) = report.timelines
    assert timeline.peak(timeline.looped) == report.peak < report.peak_whole == timeline.peak(timeline.whole)


def test_all_bytes_at_the_peaks_are_told(report):
    (timeline,) = report.timelines
    for course in (timeline.looped, timeline.whole):
        assert sum(alive.bytes for alive in course.alive) == timeline.peak(course)
        assert len(course.alive) <= courses.LISTED + 1
    assert {"parameters", "saved", "running"} <= {alive.kind for alive in timeline.whole.alive}


def test_what_is_small_is_one_entry(monkeypatch, report):
    monkeypatch.setattr(courses, "LISTED", 2)
    (timeline,) = report_of(NanoGPT(3), modules={"*blocks.1.3": False}).timelines
    assert [alive.kind for alive in timeline.whole.alive][2:] == ["other"]
    assert sum(alive.bytes for alive in timeline.whole.alive) == report.peak_whole


def test_alike_regions_are_saved_together_without_loops(report):
    (timeline,) = report.timelines
    (mlps,) = [alive for alive in timeline.whole.alive if alive.what == "mlp" and alive.kind == "saved"]
    assert (mlps.module, mlps.count) == ("blocks.*.3", 3)
    left = [alive for alive in timeline.looped.alive if alive.what == "mlp" and alive.kind == "saved"]
    assert sum(alive.bytes for alive in left) * 3 == mlps.bytes  # of the one that is not looped


def test_regions_have_their_places(report):
    (timeline,) = report.timelines
    points = len(timeline.whole.saved)
    assert [(span.pattern, span.looped) for span in timeline.spans] == [
        ("mlp", True),
        ("mlp", False),
        ("mlp", True),
        ("head", True),
    ]
    for span in timeline.spans:
        assert 0 <= span.forward < timeline.forward <= span.backward < points
        if span.looped and span.pattern == "mlp":
            assert timeline.looped.saved[span.backward] < timeline.whole.saved[span.backward]
    assert timeline.spans[0].backward > timeline.spans[3].backward  # the first one comes last


def test_the_peak_is_told_in_words(report):
    (timeline,) = report.timelines
    assert timeline.whole.at.startswith(("forward of ", "backward of "))


def test_many_parts_are_fewer_points_with_the_maxima(monkeypatch, report):
    (all_points,) = report.timelines
    monkeypatch.setattr(courses, "POINTS", 3)
    (timeline,) = report_of(NanoGPT(3), modules={"*blocks.1.3": False}).timelines
    assert len(timeline.whole.saved) == 6
    assert timeline.forward == 3
    for fewer, every in ((timeline.looped, all_points.looped), (timeline.whole, all_points.whole)):
        assert max(fewer.totals()) == max(every.totals())
        assert fewer.alive == every.alive
    assert all(span.forward < 3 <= span.backward < 6 for span in timeline.spans)
    moments = [Moment(saved=size) for size in (1, 9, 2, 3, 4, 8, 5)]
    assert [moment.saved for moment in courses._fewer(moments)] == [9, 4, 8]


def test_what_is_merged_keeps_all_timelines(report):
    both = report + report_of(MlpLM())
    assert len(both.timelines) == 2
    assert both.peak == max(timeline.peak(timeline.looped) for timeline in both.timelines)


def test_an_error_in_making_it_costs_no_loop(monkeypatch):
    def broken(*_):
        raise RuntimeError("no numbers")

    monkeypatch.setattr("mst_fx.engine.graph_timeline", broken)
    report = report_of(MlpLM())
    assert len(report.regions) == 2
    assert report.timelines == ()
    assert "no numbers" in report.refusals[0].text


def test_regions_that_are_too_small_to_be_looped_are_part_of_the_peak(report):
    """Their bodies are not traced, so that only what they save counts."""
    (timeline,) = (small := report_of(NanoGPT(3), min_bytes=2**40)).timelines
    assert {alive.what for alive in timeline.whole.alive} >= {"mlp", "head"}
    assert 0.85 * report.peak_whole < small.peak == small.peak_whole <= report.peak_whole


def test_a_graph_without_gradients_holds_nothing_for_backward():
    with torch.no_grad():
        (timeline,) = report_of(MlpLM()).timelines
    assert set(timeline.whole.saved) == set(timeline.whole.gradients) == {0}
