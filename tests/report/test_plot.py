"""The picture of a report."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from sample_reports import FULL, TIMELINE

from mst_fx.report import plot
from mst_fx.report.report import Report


def test_without_matplotlib_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "mst-fx\[plot\]"'):
        FULL.plot("memory.png")


def test_a_report_without_a_graph_has_no_picture(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no timeline to draw"):
        Report(graphs=0).plot(tmp_path / "memory.png")


@pytest.mark.parametrize("name", ["memory.png", "memory.svg"])
def test_a_picture_is_written(tmp_path, name):
    pytest.importorskip("matplotlib")
    FULL.plot(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000
    assert "matplotlib.pyplot" not in sys.modules  # it would choose a backend for the whole process


def test_a_picture_tells_its_numbers(tmp_path):
    """SVG with letters as letters."""
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        (FULL + FULL).plot(tmp_path / "memory.svg")
    text = (tmp_path / "memory.svg").read_text()
    title = "Predicted memory of a training step: peak 14.0 MiB, with 10 loops 7.0 MiB (2 graphs, each by itself)"
    assert title in text
    for told in ("graph 2 of 2, with loops: peak 7.0 MiB", "bytes alive (MiB)", "mlp model.layers.0.mlp", "forward"):
        assert told in text


def test_without_loops_there_is_one_picture_a_graph(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        replace(FULL, regions=(), peak=FULL.peak_whole).plot(tmp_path / "memory.svg")
    text = (tmp_path / "memory.svg").read_text()
    assert "peak 14.0 MiB, nothing is looped" in text
    assert "without loops: peak" in text
    assert "with loops: peak" not in text


def test_of_many_graphs_the_largest_are_drawn():
    small, large = replace(TIMELINE, parameters=1), TIMELINE
    many = (*[small] * 5, large, *[small] * 5)
    drawn = plot._drawn(many)
    assert list(drawn) == [0, 1, 2, 3, 4, 5]
    assert drawn[5] == large
