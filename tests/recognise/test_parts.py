"""Frozen weights that are tensors of tensors are taken apart; ops on them are looped, with the right gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf
from graphs import captured
from torch.utils._python_dispatch import return_and_correct_aliasing

import mst_fx
from mst_fx.capture.fingerprint import likeness_of_node
from mst_fx.core.provenance import op_name
from mst_fx.core.values import storages_of
from mst_fx.engine import Engine
from mst_fx.recognise.parts import taken_apart, takes_part
from mst_fx.recognise.pattern import patterns

aten = torch.ops.aten


class Coded(torch.Tensor):
    """A matrix in codes, with a scale a row and a shift for all."""

    @staticmethod
    def __new__(cls, codes, scale, shift):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, strides=codes.stride())

    def __init__(self, codes, scale, shift):
        self.codes, self.scale, self.shift = codes, scale, shift

    def __repr__(self):  # torch logs it
        return "Coded"

    def __tensor_flatten__(self):
        return ["codes", "scale"], {"shift": self.shift}

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Coded(inner["codes"], inner["scale"], context["shift"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in (aten.detach.default, aten.alias.default):
            given = args[0]
            same = Coded(func(given.codes), func(given.scale), given.shift)
            return return_and_correct_aliasing(func, args, kwargs or {}, same)
        plain = torch.utils._pytree.tree_map_only(Coded, lambda x: (x.codes + x.shift) * x.scale, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def coded(rows, columns, shift=0.5):
    codes = torch.randint(-4, 4, (rows, columns), dtype=torch.int8)
    return Coded(codes, torch.rand(rows, 1, dtype=torch.float64) / 8, shift)


def mlp(x, up, down, other):
    return F.linear(F.silu(F.linear(x, up) + x @ other), down)


def inputs(_):
    return [leaf(2, 24, 8), coded(32, 8), coded(8, 32, -0.25), leaf(8, 32)]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_ops_on_frozen_weights_are_looped(inner):
    """The weights of the layers are alike but for what their class has besides the parts."""

    def two_layers(x, up, down, other, second):
        return mlp(mlp(x, up, down, other), second, down, other)

    (report,) = beside_eager(two_layers, lambda k: [*inputs(k), coded(32, 8, 3.0)], inner=inner, verify=True)
    assert [region.verified for region in report.regions] == [True, True]
    assert not report.refusals


def test_ops_keep_their_names_and_parts_the_memory_of_their_weight():
    graph = captured(mlp, *inputs(0))
    apart = taken_apart(graph)
    assert [op_name(node) for node in apart.graph.nodes if "linear" in op_name(node)] == [
        op_name(node) for node in graph.graph.nodes if "linear" in op_name(node)
    ]
    parts = [node for node in apart.graph.nodes if takes_part(node)]
    assert len(parts) == 4
    assert all(storages_of(part) < storages_of(part.all_input_nodes[0]) for part in parts)
    assert taken_apart(apart) is None


def test_ops_are_alike_only_where_their_weights_are():
    def program(x, first, second, third):
        return F.linear(x, first), F.linear(x, second), F.linear(x, third)

    graph = captured(program, leaf(3, 8), coded(32, 8), coded(32, 8, 3.0), coded(32, 8))
    ops = [node for node in taken_apart(graph).graph.nodes if "linear" in op_name(node)]
    first, second, third = map(likeness_of_node, ops)
    assert first == third
    assert first != second


def test_a_graph_without_loops_stays_as_it_was():
    graph = captured(lambda x, up: F.linear(x, up).sin(), leaf(2, 24, 8), coded(4, 8))
    assert Engine(graph, mst_fx.Config(min_bytes=0, chunk_tokens=4), patterns()).rewritten().module is graph


def test_weights_with_a_gradient_stay_whole():
    x, up, down, other = inputs(0)
    graph = captured(mlp, x, torch.nn.Parameter(up), torch.nn.Parameter(down), other)
    assert taken_apart(graph) is None
    report = Engine(graph, mst_fx.Config(min_bytes=0, chunk_tokens=4), patterns()).rewritten().report
    assert not report.regions
    assert {refusal.reason for refusal in report.refusals} == {"SUBCLASS"}
