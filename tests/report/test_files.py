"""The option debug_dir: graphs and reports as files."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from graphs import captured
from models import MlpLM, tokens
from torch.fx import Graph, GraphModule

import mst_fx
from mst_fx.core.config import Config
from mst_fx.pipeline import looped_and_told
from mst_fx.report.files import DebugFiles
from mst_fx.report.report import Report

LOOP_ALL = {"min_bytes": 0, "chunk_tokens": 8, "inner": "eager"}


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


def test_each_compile_leaves_its_files(tmp_path):
    folder = tmp_path / "new" / "folder"
    looped = mst_fx.explain(MlpLM(), *tokens(), options={**LOOP_ALL, "debug_dir": str(folder)})
    torch._dynamo.reset()
    alone = mst_fx.explain(MlpLM(), *tokens(), options={"debug_dir": folder})
    assert sorted(path.name for path in folder.iterdir()) == [
        "000_captured.py",
        "000_looped.py",
        "000_report.json",
        "000_report.txt",
        "001_captured.py",
        "001_report.json",
        "001_report.txt",
    ]
    captured, changed = ((folder / f"000_{name}.py").read_text() for name in ("captured", "looped"))
    assert "mini_sequence" not in captured
    assert "class mini_sequence_forward_0" in changed  # a body
    assert "cross_entropy" in captured
    assert '"f32[120, 32][32, 1]cpu"' in captured
    assert (folder / "000_report.txt").read_text() == f"{looped}\n"
    assert json.loads((folder / "001_report.json").read_text()) == alone.to_dict()


def test_files_are_those_of_the_graph_that_is_compiled_at_last(tmp_path):
    """An inner compiler that cannot do loops gets the captured graph, which is there already."""

    def inner(gm, inputs):
        if "mini_sequence" in str(gm.graph):
            raise RuntimeError("no loops here")
        return gm

    mst_fx.explain(MlpLM(), *tokens(), options={**LOOP_ALL, "inner": inner, "debug_dir": str(tmp_path)})
    assert not (tmp_path / "000_looped.py").exists()
    assert (tmp_path / "000_captured.py").exists()


def test_a_folder_that_cannot_be_made_costs_no_compile(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    options = {**LOOP_ALL, "debug_dir": str(tmp_path / "file" / "folder")}
    with caplog.at_level(logging.WARNING, "mst_fx"):
        report = mst_fx.explain(MlpLM(), *tokens(), options=options)
    assert len(report.regions) == 2
    assert len(caplog.records) == 1
    assert "debug_dir" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(Exception, match="file"):
        mst_fx.explain(MlpLM(), *tokens(), options={**options, "strict": True})


def test_a_number_that_another_process_takes_is_not_written_over(tmp_path, monkeypatch):
    graph = Graph()
    graph.output(())
    gm = GraphModule({}, graph)
    (tmp_path / "007_captured.py").write_text("another")
    monkeypatch.setattr("pathlib.Path.iterdir", lambda path: iter(()))
    (tmp_path / "000_captured.py").write_text("just now")
    files = DebugFiles(tmp_path)
    files.captured(gm)
    files.report(Report())
    assert (tmp_path / "000_captured.py").read_text() == "just now"
    assert (tmp_path / "001_report.txt").exists()


def test_keys_of_caches_do_not_hold_the_folder():
    assert repr(Config(debug_dir="here")) == repr(Config())


def test_a_wrong_folder_is_an_error():
    for wrong in (3, "", True):
        with pytest.raises(TypeError, match="'debug_dir' takes the path of a folder"):
            Config(debug_dir=wrong)


def test_the_way_through_inductor_leaves_them_too(tmp_path):
    """That of `enable`, which compiles nothing itself."""
    gm = captured(MlpLM(), *tokens())
    module = looped_and_told(gm, Config(min_bytes=0, chunk_tokens=8, debug_dir=tmp_path))
    assert module is not gm
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000_captured.py",
        "000_looped.py",
        "000_report.json",
        "000_report.txt",
    ]
