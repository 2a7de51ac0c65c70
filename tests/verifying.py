"""What the tests of `verify` share: a loop that is wrong, and a report that says that all are right."""

from __future__ import annotations

import torch

from mst_fx.bodies import chunk


def assert_verified(report, regions):
    assert len(report.regions) == regions, str(report)
    assert {region.verified for region in report.regions} == {True}, str(report)


def wrong_body(monkeypatch):
    """The SiLU of a mini-sequence is too large by a tenth."""
    right = chunk.run_resized

    def run(node, *args):
        return right(node, *args) * (1.1 if node.target == torch.ops.aten.silu.default else 1)

    monkeypatch.setattr(chunk, "run_resized", run)
