"""One trace serves every length: its numbers that depend on the length are told from others, or it is not used."""

from __future__ import annotations

import math

import pytest
import torch

from mst_fx.bodies.stand_in import STAND_IN, traced_at_stand_in, with_length
from mst_fx.core.graph_modules import copied

FEATURES = 4


def at_all_lengths(fn, literals=()):
    return traced_at_stand_in(fn, lambda length: [torch.empty(2, length, FEATURES)], literals)


def of_length(module, length):
    module = copied(module)
    with_length(module, length)
    module.recompile()
    return module


def numbers(x):
    flat = x.reshape(-1, 2) * 0.5
    rows = torch.cat([flat, flat[:3]]).reshape(-1)
    return torch.cat([rows, rows.new_zeros(x.shape[1] + 3)]), x.sum((0, 2)).expand(7, x.shape[1])


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("for_any", [False, True])
def test_every_length_gives_what_the_function_gives(length, for_any):
    module = of_length(at_all_lengths(numbers), None if for_any else length)
    x = torch.randn(2, length, FEATURES)
    for ours, eager in zip(module(x), numbers(x), strict=True):
        assert torch.equal(ours, eager)
    assert str(STAND_IN)[:-2] not in module.code


def test_values_have_the_size_of_the_chunk():
    nodes = of_length(at_all_lengths(numbers), 5).graph.nodes
    sizes = [list(node.meta["val"].shape) for node in nodes if "val" in node.meta]
    assert (sizes[0], sizes[-1]) == ([2, 5, FEATURES], [7, 5])
    (given, *_) = of_length(at_all_lengths(numbers), None).graph.nodes
    assert isinstance(given.meta["val"].shape[1], torch.SymInt)


@pytest.mark.parametrize(
    "unclear",
    [
        lambda x: x * (1 / x.shape[1]),
        lambda x: x * (x.shape[1] / FEATURES),
        lambda x: x[:, : x.shape[1] // 3],
        lambda x: x * x.shape[1] ** 2,
        lambda x: x * (x.shape[1] + 1000),
        lambda x: x.reshape(2, -1, 8),  # a prime has no such factor
        lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: x * 1e-9,
        lambda x: x * (1 << 40),
    ],
)
def test_a_number_that_may_depend_on_the_length_or_not_ends_it(unclear):
    assert at_all_lengths(unclear) is None


@pytest.mark.parametrize("literal", [1e-9, 1 << 40, -math.inf, 0.0, 1.44])
def test_numbers_of_the_program_are_clear(literal):
    module = at_all_lengths(lambda x: x * literal, {literal})
    x = torch.randn(2, 3, FEATURES)
    assert torch.equal(of_length(module, None)(x), x * literal)
