"""What a report tells of a region."""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, rewritten
from models import D, Gelu, V, tokens
from torch import nn

import mst_fx
from mst_fx.report import report as module


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mlp, self.head = nn.Embedding(V, D), Gelu(), nn.Linear(D, V)

    def forward(self, ids, labels):
        x = self.tokens(ids)
        logits = self.head(x + self.mlp(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_returned_logits_are_explained():
    torch._dynamo.reset()
    report = mst_fx.explain(Head(), *tokens(), options={"min_bytes": 0})
    region = report.regions[-1]
    assert "Returned logits have to exist: " in str(region)
    assert "returned_logits='detach' does without it" in str(region)


def test_report_tells_the_bytes():
    def head(x, w, labels):
        return F.cross_entropy(F.linear(x, w), labels)

    length, width, classes, chunk = 1024, 64, 4096, 128
    x, w = (torch.randn(size, width, requires_grad=True) for size in (length, classes))
    labels = torch.randint(0, classes, (length,))
    _, report = rewritten(captured(head, x, w, labels), chunk_tokens=chunk)
    (region,) = report.regions
    assert region.bytes_before == 8 * region.bytes_after
    assert region.bytes_before == 2 * length * classes * 4  # the logits and their log-softmax


def test_a_summary_is_one_report_of_all(monkeypatch):
    monkeypatch.setattr(module, "_MADE", deque())
    monkeypatch.setattr(module, "given_up", list)  # of other tests
    assert "nothing was compiled with mst_fx yet" in str(mst_fx.summary())
    for peak in (3, 5, 4):
        module.record(mst_fx.Report(peak=peak, peak_whole=peak))
    assert (mst_fx.summary().graphs, mst_fx.summary().peak) == (3, 5)
