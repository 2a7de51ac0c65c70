"""Complex numbers: gradients are left to autograd, and so are views that conjugate what they read."""

from __future__ import annotations

import pytest
import torch
from beside import beside_eager, leaf


def numbers(*shape):
    return torch.randn(shape, dtype=torch.complex128, requires_grad=True)


def all_complex(x, up, down):
    return (x @ up).tanh() @ down


def scaled(x, up, down, scale):
    return ((x @ up) * scale).abs() @ down


@pytest.mark.parametrize("program", [all_complex, scaled], ids=lambda program: program.__name__)
def test_gradients_of_complex_numbers(program):
    made = numbers if program is all_complex else leaf

    def inputs(_):
        return [made(3, 7, 4), made(4, 16), made(16, 4), numbers(16)][: program.__code__.co_argcount]

    (report,) = beside_eager(program, inputs)
    assert [refusal.reason for refusal in report.refusals] == ["COMPLEX"]
    assert "is complex and needs a gradient" in report.refusals[0].text


def conjugated(x, up, down):
    return (x.to(up.dtype) @ up.conj()).abs() @ down


def negated(x, up, down):
    return (x @ up.conj().imag).tanh() @ down


@pytest.mark.parametrize("program", [conjugated, negated], ids=lambda program: program.__name__)
def test_views_that_change_what_they_read(program):
    def inputs(_):
        return [leaf(3, 7, 4).detach(), numbers(4, 16).detach(), leaf(16, 4)]

    (report,) = beside_eager(program, inputs)
    assert [refusal.reason for refusal in report.refusals] == ["COMPLEX"]


def test_a_second_region_that_reads_such_a_view():
    def program(x, up, down):
        return (x @ up).tanh() @ down + 3 * ((x @ torch._neg_view(up)).tanh() @ down)

    def inputs(_):
        return [leaf(3, 7, 4), leaf(4, 16).detach(), leaf(16, 4)]

    (report,) = beside_eager(program, inputs)
    assert [refusal.reason for refusal in report.refusals] == ["COMPLEX"]


def test_complex_numbers_without_gradient_are_looped():
    def inputs(_):
        return [x.detach() for x in (leaf(3, 7, 4), leaf(4, 16), leaf(16, 4), numbers(16))]

    (report,) = beside_eager(scaled, inputs)
    assert len(report.regions) == 1
