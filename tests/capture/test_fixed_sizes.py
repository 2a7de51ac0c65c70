"""Lengths that a loop needs equal: taken as equal where it is looped, and not compared where it is not."""

from __future__ import annotations

import pytest
import torch
from numerics import looped

import mst_fx


@pytest.fixture(autouse=True)
def _reset():
    torch.manual_seed(0)
    torch._dynamo.reset()


def log_probabilities(x, w, labels):
    """Nobody compares the lengths of the tokens and of the labels: `gather` takes fewer rows than there are."""
    return (x @ w).log_softmax(-1).gather(-1, labels[..., None]).sum()


def shifted_log_probabilities(x, w, labels):
    logits = (x @ w).float()[:, :-1]
    return logits.log_softmax(-1).gather(-1, labels[:, 1:, None]).exp().sum()


def log_probabilities_of_rows(x, w, labels):
    rows = (x @ w).view(-1, w.shape[1])
    return (rows.gather(1, labels.reshape(-1, 1)).squeeze(1) - rows.logsumexp(-1)[: labels.numel()]).sum()


PROGRAMS = [log_probabilities, shifted_log_probabilities, log_probabilities_of_rows]


def test_labels_whose_batch_varies_with_the_length():
    """The batch of the tokens is fixed, that of the labels with it."""
    compiled = looped(lambda x, w, y: torch.nn.functional.cross_entropy((x @ w).view(-1, 40), y.reshape(-1)))
    before = len(mst_fx.reports())
    for batch, length in ((2, 20), (3, 37), (3, 21), (3, 50)):
        compiled(torch.randn(batch, length, 8), torch.randn(8, 40), torch.randint(0, 40, (batch, length)))
    assert [len(report.regions) for report in mst_fx.reports()[before:]] == [1, 1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_lengths_that_nobody_compares_are_taken_as_equal(program):
    def compare(length, rows):
        x, w, labels = torch.randn(2, length, 8).double(), torch.randn(8, 40).double(), torch.randint(0, 40, (2, rows))
        gradients = []
        for fn in (compiled, program):
            leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
            fn(*leaves, labels).backward()
            gradients.append([leaf.grad for leaf in leaves])
        torch.testing.assert_close(*gradients)

    compiled = looped(program)
    before = len(mst_fx.reports())
    for length in (20, 37, 50, 19):
        compare(length, length)
    assert [len(report.regions) for report in mst_fx.reports()[before:]] == [1, 1]
    compare(37, 30)
    compare(50, 50)
    assert [len(report.regions) for report in mst_fx.reports()[before:]] == [1, 1, 0]


def test_lengths_of_what_is_left_alone_are_not_compared():
    compiled = looped(log_probabilities, min_bytes=2**30)
    before = len(mst_fx.reports())
    for length, rows in ((20, 20), (37, 37), (40, 30), (50, 50)):
        compiled(torch.randn(2, length, 8), torch.randn(8, 40), torch.randint(0, 40, (2, rows)))
    assert len(mst_fx.reports()) - before == 2


def test_a_length_that_the_caller_marks_is_not_fixed_for_one_that_does_not_vary():
    x, w, labels = torch.randn(2, 20, 8), torch.randn(8, 40), torch.randint(0, 40, (2, 20))
    torch._dynamo.mark_dynamic(labels, 1)
    compiled = looped(log_probabilities)
    compiled(x, w, labels)
    (refusal,) = mst_fx.reports()[-1].refusals
    assert refusal.reason == "DYNAMIC"
    assert "where the axis has 20" in refusal.text
    assert ".gather(-1, labels[..., None])" in refusal.source
