"""What the logger "mst_fx" tells at each level."""

from __future__ import annotations

import logging

import pytest
import torch
from models import MlpLM, tokens

import mst_fx
from mst_fx.core import module_paths

LOOP_ALL = {"min_bytes": 0, "chunk_tokens": 8, "inner": "eager"}


def told(caplog, level: int, **options) -> list[str]:
    torch._dynamo.reset()
    caplog.clear()
    with caplog.at_level(level, "mst_fx"):
        mst_fx.explain(MlpLM(), *tokens(), options={**LOOP_ALL, **options})
    return [record.getMessage() for record in caplog.records if record.name == "mst_fx"]


def test_debug_messages_tell_each_decision_as_it_is_taken(caplog):
    messages = [message for message in told(caplog, logging.DEBUG) if "is not understood" not in message]
    steps = [message.removeprefix("mst_fx: ").partition(":")[0] for message in messages]
    assert list(dict.fromkeys(steps)) == [
        "found",
        "bodies",
        "plan",
        "spliced",
        "2 looped, 0 left alone, 1 graph\npeak of a step",
    ]
    assert [step for step in steps if step in ("found", "spliced")] == ["found"] * 2 + ["spliced"] * 2
    found = next(message for message in messages if "found: gated_mlp" in message)
    assert "gated_mlp at mlp (models.py:" in found
    assert any("chunks of 8 positions, 5 of them" in message for message in messages)


def test_what_is_left_alone_is_told_with_the_reason(caplog):
    messages = told(caplog, logging.DEBUG, modules={"mlp": False})
    (left,) = [message for message in messages if "no loop: the option `modules`" in message]
    assert left.startswith("mst_fx: plan: gated_mlp at mlp")

    def head(x, w, labels):
        logits = torch.nn.functional.linear(x, w)
        return torch.nn.functional.cross_entropy(logits, labels) + torch.linalg.inv(logits @ logits.T).sum()

    inputs = [torch.randn(16, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True), torch.randint(64, (16,))]
    caplog.clear()
    torch._dynamo.reset()
    with caplog.at_level(logging.DEBUG, "mst_fx"):
        report = mst_fx.explain(head, *inputs, options=LOOP_ALL)
    (refusal,) = report.refusals
    assert "mst_fx: refused: head at the top (test_logs.py:" in caplog.text
    assert f"{refusal.reason}: {refusal.text}" in caplog.text


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_at_other_levels_no_place_is_looked_up(caplog, monkeypatch, level):
    def looked_up(self):
        raise AssertionError

    monkeypatch.setattr(module_paths.At, "__str__", looked_up)
    messages = told(caplog, level)
    assert len(messages) == (level == logging.INFO)  # the report
