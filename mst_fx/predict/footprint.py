"""Bytes that one loop holds, predicted from its body: results, sums, and the temporaries of one chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

import torch
from torch.fx import Node

from mst_fx.bodies.body import Body
from mst_fx.core.aten_ops import CONTRACTIONS
from mst_fx.core.sizes import Hint
from mst_fx.core.values import bytes_made, bytes_of
from mst_fx.kernels.liveness import buffer_of, peak
from mst_fx.runtime.loop_operator import LoopSpec
from mst_fx.runtime.products import groups_made_at_once
from mst_fx.runtime.result_kinds import Cat, Grouped, Outer, ResultKind, Rows, Sum


@dataclass(frozen=True)
class Footprint:
    """Bytes that one loop holds besides its operands.

    Attributes:
        results: bytes of the results that the loop writes chunk by chunk, at the whole length.
        sums: bytes of the sums over the chunks, in the dtype that they add up in.
        cast: bytes of the largest sum in the dtype that it is returned in, where that is another one.
        returned: bytes of the sums in the dtype that they are returned in.
        native: bytes of the sums in the dtype of the values that add up.
        fixed: bytes of a chunk's temporaries that do not grow with its length.
        each: bytes of a chunk's temporaries for one position.
        apart: bytes of what a chunk makes before it is added to the sums, in the dtype that it is made in.
    """

    results: int = 0
    sums: int = 0
    cast: int = 0
    returned: int = 0
    native: int = 0
    fixed: int = 0
    each: float = 0.0
    apart: int = 0

    def temporaries(self, positions: int) -> int:
        """Return the bytes of the temporaries of one chunk of that many positions."""
        return self.fixed + round(self.each * positions)

    def peak(self, positions: int) -> int:
        """Return the most bytes at once, with chunks of that many positions."""
        return self.results + self.sums + max(self.temporaries(positions), self.cast)

    @property
    def left(self) -> int:
        """The bytes that remain after the loop: results and gradients."""
        return self.results + self.returned


NOTHING = Footprint()


def footprint(body: Body, spec: tuple[Any, ...], length: int, at: Hint) -> Footprint:
    """Return the bytes of the loop that runs a body.

    Args:
        body: the body of a full chunk.
        spec: a `loop_operator.LoopSpec` as a tuple.
        length: positions of the whole axis.
        at: tells sizes that vary.
    """
    chunk, ins = LoopSpec(*spec).chunk, LoopSpec(*spec).ins
    results = sums = returned = native = apart = cast = product = 0
    for kind, nodes in by_result(body):
        if not isinstance(kind, Sum):
            results += _split_bytes(kind, nodes[0].meta["val"], chunk, length, at)
            continue
        added = _added(kind, nodes, at, several=length > chunk)
        sums += added.sum
        returned += added.returned
        native += added.native
        apart += added.native if added.product or not isinstance(kind, Outer) else 0
        cast = max(cast, added.returned if kind.result != kind.adds_up_in(several=length > chunk) else 0)
        product = max(product, added.product)
    fixed, each = _temporaries(body, ins, chunk, product, at)
    return Footprint(results, sums, cast, returned, native, fixed, each, apart)


@dataclass(frozen=True)
class _Added:
    """Bytes of one sum over the chunks.

    Attributes:
        sum: bytes in the dtype that it adds up in.
        returned: bytes in the dtype that it is returned in.
        native: bytes in the dtype of the values that add up.
        product: most bytes of products at once, as made and as cast to the sum's dtype, before they are added; 0 where
            the device multiplies into the sum.
    """

    sum: int
    returned: int
    native: int
    product: int


def _added(kind: Sum, nodes: list[Node], at: Hint, *, several: bool) -> _Added:
    value: torch.Tensor = nodes[0].meta["val"]
    count, adds_up_in = (
        at(prod(kind.shape([node.meta["val"].shape for node in nodes]))),
        kind.adds_up_in(several=several),
    )
    product = _made(kind, nodes, count) * (value.itemsize + (adds_up_in.itemsize if is_on_cpu(nodes[0]) else 0))
    cast = value.dtype != adds_up_in or not is_on_cpu(nodes[0])
    return _Added(
        count * adds_up_in.itemsize, count * kind.result.itemsize, count * value.itemsize, product if cast else 0
    )


def _made(kind: Sum, nodes: list[Node], count: int) -> int:
    """Return how many elements of products are made at once, of a sum of `count`, where they are not added as made."""
    if isinstance(kind, Grouped):
        groups = nodes[2].meta["val"].shape[0]
        return count // groups * groups_made_at_once(nodes[0].meta["val"].device, groups)
    return count if isinstance(kind, Outer) and is_on_cpu(nodes[0]) else 0


def _temporaries(body: Body, ins: Sequence[Any], chunk: int, product: int, at: Hint) -> tuple[int, float]:
    """Return the bytes of a chunk's temporaries that do not grow with its length, and those of one position.

    They are a straight line through the bytes of a chunk and of one twice as long.
    """
    whole, on_cpu = whole_nodes(body, at), is_on_cpu(_inputs(body)[0])
    split = [(node, axis) for node, axis in zip(_inputs(body), ins, strict=True) if axis is not None]
    copied = sum(bytes_made(node, at) for node, axis in split if _is_copied(node, axis))
    how = {"reductions_apart": on_cpu, "costly_once": on_cpu, "ordered": True}
    once, twice = (alive(body, whole, times, at, **how) for times in (1, 2))
    each = (twice - once + copied) / chunk
    outputs = {buffer_of(node) for node in _outputs(body)}
    at_rest = product + sum(bytes_made(node, at) for node in outputs if node.op != "placeholder")
    return max(0, round(max(once, at_rest) + copied - each * chunk)), each


def is_on_cpu(node: Node) -> bool:
    """Return whether the value of a node lies in the memory of the CPU."""
    return bool(node.meta["val"].device.type == "cpu")


def by_result(body: Body) -> Iterator[tuple[ResultKind, list[Node]]]:
    """Yield the kind of each result of the loop, and the outputs of the body that it is made from."""
    outputs = iter(_outputs(body))
    for kind in body.outs:
        yield kind, list(islice(outputs, kind.outputs))


def _split_bytes(kind: Cat | Rows, value: torch.Tensor, chunk: int, length: int, at: Hint) -> int:
    """Return the bytes of a result that is written chunk by chunk, at the whole length."""
    if isinstance(kind, Cat):
        return bytes_of(value, at) * length // chunk
    return at(prod(kind.shape(length))) * value.element_size()


def alive(body: Body, fixed: set[Node], times: float, at: Hint, **how: Any) -> float:
    """Return the most bytes at once of a body's temporaries, where one chunk is as long as `times` chunks.

    Args:
        body: of a chunk.
        fixed: the nodes whose bytes do not grow with the chunk.
        times: how many chunks are taken as one.
        at: tells sizes that vary.
        how: keyword arguments of `liveness.peak`.
    """

    def size(node: Node) -> float:
        return bytes_made(node, at) * (1 if node in fixed else times)

    return peak(body.module.graph, size, **how)


def _outputs(body: Body) -> list[Node]:
    returned: Any = body.module.graph.output_node().args[0]
    return list(returned)


def _inputs(body: Body) -> list[Node]:
    return [node for node in body.module.graph.nodes if node.op == "placeholder"]


def _is_copied(node: Node, axis: tuple[int, int, int]) -> bool:
    """Return whether a chunk of the operand is not contiguous."""
    dim, outer, _ = axis
    return outer * prod(node.meta["val"].shape[:dim]) > 1


def whole_nodes(body: Body, at: Hint) -> set[Node]:
    """Return the nodes of the size of a whole operand: outputs that add up, and what only these are made from."""
    whole: set[Node] = set()
    for kind, (node, *_) in by_result(body):
        while type(kind) is Sum and node.op == "call_function" and node not in whole:
            whole.add(node)
            operands = [operand for operand in node.all_input_nodes if bytes_made(operand, at) == bytes_made(node, at)]
            if node.target in CONTRACTIONS or len(operands) != 1:
                break
            (node,) = operands
    return whole
