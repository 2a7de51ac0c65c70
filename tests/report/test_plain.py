"""A report as plain types, JSON and HTML."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from sample_reports import FULL, MIB, refusal

from mst_fx.report.items import Dropped, EarlyCut, LoopedRegion, RefusedRegion
from mst_fx.report.report import Report
from mst_fx.report.timeline import Alive, Course, GraphTimeline, Span
from mst_fx.report.unknown_ops import UnknownOp
from mst_fx.report.unlooped import Unlooped


def test_json_gives_back_what_the_dict_has():
    assert json.loads(FULL.to_json()) == json.loads(FULL.to_json(indent=1)) == FULL.to_dict()
    assert json.loads(Report(graphs=0).to_json()) == Report(graphs=0).to_dict()


def test_every_field_is_there_under_its_name():
    told = FULL.to_dict()
    assert list(told) == ["format", *(field.name for field in fields(Report)), "change_first", "how_sure"]
    assert told["format"] == 1
    (timeline,) = told["timelines"]
    found = {
        LoopedRegion: told["regions"][0],
        RefusedRegion: told["refusals"][0],
        EarlyCut: told["cuts"][0],
        Dropped: told["dropped"][0],
        Unlooped: told["unlooped"][0],
        UnknownOp: told["unknown_ops"][0],
        GraphTimeline: timeline,
        Course: timeline["looped"],
        Alive: timeline["looped"]["alive"][0],
        Span: timeline["spans"][0],
    }
    for kind, entry in found.items():
        assert list(entry) == [field.name for field in fields(kind)]
    assert len(told["regions"]) == len(FULL.regions)  # one entry each
    assert told["peak"] == FULL.peak == 7 * MIB


def test_html_is_one_table_and_escaped():
    text = FULL._repr_html_()
    assert text.count("<table>") == text.count("</table>") == 1
    assert "4 x gated_mlp" in text
    assert "14.0 MiB -&gt; 7.0 MiB" in text
    worse = Report(refusals=(refusal(0, text="<script>x & y</script>", source="a.py:1: <b>"),), notes=("<i>",))
    assert "<script>" not in worse._repr_html_()
    assert "&lt;script&gt;x &amp; y&lt;/script&gt;" in worse._repr_html_()
    assert "<b>" not in worse._repr_html_()
    assert "<i>" not in worse._repr_html_()


@pytest.mark.parametrize("report", [Report(graphs=0), Report()])
def test_html_of_nothing_has_no_table(report):
    assert "<table>" not in report._repr_html_()
