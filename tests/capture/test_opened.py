"""Ops of other libraries are opened to the matrix product that their kernel for all devices computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf, looped_regions
from torch.autograd import Function
from torch.distributed import _functional_collectives  # noqa: F401 - registers the ops
from torch.fx import Graph

from mst_fx.capture import opened

library = torch.library.Library("opened_by_tests", "DEF")
library.define("unpack(Tensor codes) -> Tensor")
library.define("packed_product(Tensor x, Tensor codes) -> Tensor")
library.define("opaque_product(Tensor x, Tensor codes) -> Tensor")


def unpack(codes):
    return codes.double() / 8


def product(x, codes):
    return F.linear(x, torch.ops.opened_by_tests.unpack(codes))


def closed(x, codes):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


library.impl("unpack", unpack, "CPU")
library.impl("packed_product", product, "CompositeExplicitAutograd")
library.impl("opaque_product", product, "CPU")
torch.library.register_fake("opened_by_tests::unpack", lambda codes: codes.new_empty(codes.shape, dtype=torch.float64))
torch.library.register_fake("opened_by_tests::packed_product", closed)
torch.library.register_fake("opened_by_tests::opaque_product", closed)


class Product(Function):
    @staticmethod
    def forward(ctx, x, codes, opaque):
        ctx.save_for_backward(codes)
        ops = torch.ops.opened_by_tests
        return ops.opaque_product(x, codes) if opaque else ops.packed_product(x, codes)

    @staticmethod
    def backward(ctx, grad):
        return grad @ torch.ops.opened_by_tests.unpack(ctx.saved_tensors[0]), None, None


@pytest.mark.parametrize("opaque", [False, True])
def test_only_an_op_with_a_kernel_for_all_devices_is_looped(opaque):
    """The op that unpacks the weight has no rule: it runs once, before the loop."""

    def inputs(_):
        return [leaf(2, 24, 8), *(torch.randint(-8, 8, shape, dtype=torch.int8) for shape in ((32, 8), (8, 32)))]

    def program(x, up, down):
        return Product.apply(F.gelu(Product.apply(x, up, opaque)), down, opaque)

    reports = beside_eager(program, inputs, inner="aot_eager")
    assert looped_regions(reports) == (not opaque)


def test_collectives_are_not_run(monkeypatch):
    """Their kernels would communicate in the middle of a compile, which other ranks may not be in."""
    run = []
    monkeypatch.setattr(opened, "kernel_for_all_devices", run.append)
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, device="meta")
    graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0"))
    assert not opened.openings(graph)
    assert not run
