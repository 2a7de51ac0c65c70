"""Options that name modules and patterns: what of it is not in a graph is told."""

from __future__ import annotations

import logging

from graphs import captured, rewritten
from models import MlpLM, tokens

from mst_fx.survey import wishes


def test_paths_that_match_nothing_are_told(monkeypatch, caplog):
    monkeypatch.setattr(wishes, "_warned", set())
    paths = {"layers.7.mlp": False, "*.down": True, "tokens": True}
    with caplog.at_level(logging.WARNING, "mst_fx"):
        _, report = rewritten(captured(MlpLM(), *tokens()), modules=paths)
    assert len(report.regions) == 2
    assert [note.split("'")[1] for note in report.notes] == ["layers.7.mlp", "tokens"]
    assert "matches no module of this graph" in str(report)
    _, again = rewritten(captured(MlpLM(), *tokens()), modules=paths)
    assert again.notes == report.notes
    assert len([record for record in caplog.records if record.name == "mst_fx"]) == 2  # each is said once


def test_patterns_that_are_left_out_are_told():
    _, report = rewritten(captured(MlpLM(), *tokens()), disable=("gated_mlp", "mlp", "head"))
    assert "no pattern matched" in str(report)
    assert "disable: without gated_mlp, head, mlp" in str(report)
