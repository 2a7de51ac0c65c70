"""The same program gives the same report and the same graph, wherever in memory its nodes lie: sets have no order.

Ranks that compile one program need the same loops, and caches on disk are found by the text of a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured
from torch.fx import GraphModule, Node

import mst_fx
from mst_fx.engine import Engine
from mst_fx.recognise.pattern import patterns

TOKENS, HIDDEN, CLASSES = 16, 8, 64


def several_unknown(x):
    logits = torch.linalg.inv(torch.linalg.matrix_exp(torch.linalg.cholesky(x)))
    return F.cross_entropy(logits, torch.arange(len(logits)))


def several_written_later(x, w, v):
    y = F.gelu(x @ w) @ v
    x.data.mul_(2)
    w.data.mul_(2)
    v.data.mul_(2)
    return y.sum()


def tensor(*shape):
    return torch.randn(*shape, requires_grad=True)


MLP = (tensor(TOKENS, HIDDEN), tensor(HIDDEN, CLASSES), tensor(CLASSES, HIDDEN))
PROGRAMS: dict[Callable[..., Any], tuple[torch.Tensor, ...]] = {
    several_unknown: (torch.eye(CLASSES).requires_grad_(),),
    several_written_later: MLP,
}


def outcome(gm: GraphModule) -> tuple[str, str]:
    rewritten = Engine(gm, mst_fx.Config(min_bytes=0, num_chunks=4, strict=True), patterns()).rewritten()
    return str(rewritten.report), str(rewritten.module.code)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_the_order_of_sets_does_not_matter(program, monkeypatch):
    seen = set()
    for factor in range(3, 19, 2):
        monkeypatch.setattr(Node, "__hash__", lambda node, factor=factor: id(node) * factor % 10_007)
        seen.add(outcome(captured(program, *PROGRAMS[program])))
    assert len(seen) == 1
