"""Regions that are too large to run as they are: they run at smaller sizes, or it is told that they do not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import rewritten
from verifying import assert_verified, wrong_body

from mst_fx.verify import verify


def captured_unrun(fn, *inputs):
    """A graph for tensors that take no memory until they are written."""
    seen = []
    torch._dynamo.reset()
    backend = lambda gm, _: seen.append(gm) or (lambda *args: (torch.zeros(()),))  # noqa: E731
    torch.compile(fn, backend=backend, fullgraph=True)(*inputs)
    return seen[0]


def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16).requires_grad_()


def swiglu(x, gate_up, down, view=()):
    gate, up = (x @ gate_up).chunk(2, -1)
    h = F.silu(gate) * up
    return (h.view(*h.shape[:-1], *view).softmax(-1).flatten(-2) if view else h) @ down


def cross_entropy(x, w, labels):
    return F.cross_entropy((x @ w)[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    ("fn", "shapes", "dynamic"),
    [
        (swiglu, [(2, 16384, 4096), (4096, 28672), (14336, 4096)], False),
        (swiglu, [(1, 4096, 4096), (4096, 28672), (14336, 4096)], False),  # as many tokens as features
        (cross_entropy, [(2, 8192, 4096), (4096, 128256)], True),
    ],
)
def test_large_regions_run_at_small_sizes(monkeypatch, fn, shapes, dynamic):
    inputs = [empty(*shape) for shape in shapes]
    inputs += [torch.zeros(shapes[0][:-1], dtype=torch.long)] if fn is cross_entropy else []
    for x in [x for x in inputs if dynamic and x.shape[:2] == shapes[0][:2]]:
        torch._dynamo.mark_dynamic(x, 1)
    elements, run = [], verify.outcomes

    def watched(program, given, *args, **options):
        elements.extend(x.numel() for x in given if isinstance(x, torch.Tensor))
        return run(program, given, *args, **options)

    monkeypatch.setattr(verify, "outcomes", watched)
    _, report = rewritten(captured_unrun(fn, *inputs), verify=True, chunk_tokens=1024)
    assert_verified(report, regions=1)
    assert "at smaller sizes (" in str(report)
    assert f"{shapes[1][0]} -> 16" in str(report)
    assert 0 < max(elements) < 2**21


def test_a_long_length_that_varies_runs_short(monkeypatch):
    x, up, down = empty(2, 2**16, 64), empty(64, 256), empty(128, 64)
    torch._dynamo.mark_dynamic(x, 1)
    _, report = rewritten(captured_unrun(swiglu, x, up, down), verify=True, chunk_tokens=1024)
    assert_verified(report, regions=1)
    assert "at 33 of its positions" in str(report)


def test_a_fault_shows_at_small_sizes(monkeypatch):
    wrong_body(monkeypatch)
    _, report = rewritten(
        captured_unrun(swiglu, empty(2, 8192, 4096), empty(4096, 28672), empty(14336, 4096)), verify=True
    )
    assert [refusal.reason for refusal in report.refusals] == ["DIFFERS"]


def test_tells_what_it_could_not_run():
    fn = partial(swiglu, view=(112, 128))
    graph = captured_unrun(fn, empty(2, 8192, 4096), empty(4096, 28672), empty(14336, 4096))
    _, report = rewritten(graph, verify=True, chunk_tokens=1024)
    assert [region.verified for region in report.regions] == [False]
    assert "Could not be verified: it is too large to run, and does not run at smaller sizes: " in str(report)
