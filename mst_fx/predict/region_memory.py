"""Bytes of a region as a function of the length of a mini-sequence, predicted from its graphs. No policy here.

A loop holds its results, the sums of what adds up, and the temporaries of one mini-sequence; a region that is not
looped holds the temporaries of all of them, and keeps the results of its matrix products for backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

import torch
from torch.fx import Node

from mst_fx.bodies.body import Body
from mst_fx.bodies.call import Call
from mst_fx.bodies.work import Work
from mst_fx.core.aten_ops import CONTRACTIONS, VIEWS
from mst_fx.core.graph_walk import descendants
from mst_fx.core.sizes import hint
from mst_fx.core.values import bytes_made
from mst_fx.kernels.liveness import buffer_of, peak
from mst_fx.placement.partition import Stages
from mst_fx.placement.placement import split_of
from mst_fx.placement.rules.contraction import factors
from mst_fx.runtime.loop_operator import LoopSpec
from mst_fx.runtime.result_kinds import Cat, Outer, ResultKind, Rows, Sum


@dataclass(frozen=True)
class Footprint:
    """Bytes that one loop holds above its operands.

    Attributes:
        results: of the results that the loop writes chunk by chunk, at the whole length.
        sums: of what adds up over the chunks, in the dtype that it adds up in.
        cast: of the largest sum in the dtype that it is returned in, where that is another one.
        returned: of the sums as they are returned.
        native: of the sums in the dtype of what adds up.
        fixed: of a mini-sequence's temporaries, those that do not grow with its length.
        each: of a mini-sequence's temporaries, those of one position.
    """

    results: int = 0
    sums: int = 0
    cast: int = 0
    returned: int = 0
    native: int = 0
    fixed: int = 0
    each: float = 0.0

    def temporaries(self, positions: int) -> int:
        """Of one mini-sequence of that many positions."""
        return self.fixed + round(self.each * positions)

    def peak(self, positions: int) -> int:
        """Most bytes at once, with mini-sequences of that many positions."""
        return self.results + self.sums + max(self.temporaries(positions), self.cast)

    @property
    def left(self) -> int:
        """What is left when the loop is over: results and gradients."""
        return self.results + self.returned


@dataclass(frozen=True)
class RegionMemory:
    """Bytes of a region, in a loop and as written.

    Attributes:
        written: of the temporaries of the whole region as its program writes them, before anything is fused.
        forward: of the loop that runs in the forward; gradients included where they come in the forward.
        backward: of the loop that runs in the backward, None where there is none.
        saved: what is kept for backward in a loop, besides what the region reads.
        saved_whole: the same without a loop.
        scaled: of the gradients that were made in the forward, as backward gives them.
        rescaled: of the largest gradient that was made in the forward and that backward casts while it scales it; those
            that it does not cast are scaled in place.
        whole_forward, whole_backward: most at once without a loop, results and gradients included.
        whole_again: of the backward, where what is saved is computed again right before it: one kernel makes that, too.
        stream_gradient: of the stream's gradient, where the stream itself is large: nothing in the loop makes it from
            less.
    """

    written: int
    forward: Footprint = Footprint()
    backward: Footprint | None = None
    saved: int = 0
    scaled: int = 0
    rescaled: int = 0
    saved_whole: int = 0
    whole_forward: int = 0
    whole_backward: int = 0
    whole_again: int = 0
    stream_gradient: int = 0


def temporary_bytes(stages: Stages, length: int) -> int:
    """Bytes of the split values that the loop makes and does not return, for `length` positions of the axis.

    Views count nothing. It is what eager execution keeps for backward or frees at the region's end at the latest; a
    compiler that fuses elementwise ops makes fewer of them.
    """
    made = (node for node in stages.loop if node not in stages.results and node.target not in VIEWS)
    return sum(bytes_per_position(stages, node) for node in made) * length


def bytes_per_position(stages: Stages, node: Node) -> int:
    """Bytes of a split value for one position of the axis; 0 for a value that is not split."""
    split, value = split_of(stages.placements.of[node]), node.meta["val"]
    if split is None or not isinstance(value, torch.Tensor):
        return 0
    return hint(value.numel()) // hint(split.axis_length(value.shape)) * value.element_size()


def memory_of(work: Work, call: Call) -> RegionMemory:
    """Predict from the bodies of one length what every length takes."""
    stages = work.stages
    length = hint(stages.length)
    forward, backward = (
        footprint(body, spec, length) if body is not None else None
        for body, spec in ((call.forward, call.spec.forward_spec), (call.backward, call.spec.backward_spec))
    )
    in_forward = forward is None
    gradients = _gradients_saved(work, call) if in_forward else []
    saved_whole = sum(bytes_per_position(stages, node) for node in _saved_whole(work)) * length
    weights = backward.native if backward is not None else 0
    early, late = (weights + _whole(call, length, early=early) for early in (True, False))
    return RegionMemory(
        written=temporary_bytes(stages, length),
        forward=forward or backward or Footprint(),
        backward=None if in_forward else backward,
        saved=sum(saved for _, saved in gradients),
        scaled=sum(own for own, _ in gradients),
        rescaled=max((own for own, saved in gradients if own != saved), default=0),
        saved_whole=saved_whole,
        whole_forward=saved_whole if forward is None else forward.temporaries(length) + forward.left,
        whole_backward=early,
        whole_again=late,
        stream_gradient=_stream_gradient(work),
    )


def _gradients_saved(work: Work, call: Call) -> list[tuple[int, int]]:
    """Of each gradient that is made in the forward: its bytes as the operand's, and as it is kept for backward."""
    kinds = call.backward.outs[-len(work.wanted) :] if work.wanted and call.backward else ()
    values: list[torch.Tensor] = [work.stages.operands[i].meta["val"] for i in work.wanted]
    dtypes = [kind.result if isinstance(kind, Sum) else x.dtype for x, kind in zip(values, kinds, strict=True)]
    counts = [hint(x.numel()) for x in values]
    return [(n * x.itemsize, n * dtype.itemsize) for n, x, dtype in zip(counts, values, dtypes, strict=True)]


def written_after(work: Work, chunk: int) -> int:
    """Bytes of the temporaries that a loop leaves of those written, and of the stream's gradient if it is large."""
    return temporary_bytes(work.stages, min(chunk, hint(work.stages.length))) + _stream_gradient(work)


def _stream_gradient(work: Work) -> int:
    wanted = {work.stages.operands[i] for i in work.wanted}
    return bytes_made(work.stages.stream) if not work.stages.products and work.stages.stream in wanted else 0


def _saved_whole(work: Work) -> list[Node]:
    """What a region that is not looped saves for backward: its products, and what they read for a factor's gradient."""
    if work.backward == "none":
        return []
    stages = work.stages
    inside = set(stages.loop)
    carrying = descendants((stages.operands[i] for i in work.wanted), lambda node: inside.intersection(node.users))
    saved = {node: node for node in stages.products if node not in stages.results and not is_sink(stages, node)}
    for left, right in map(factors, stages.products):
        saved.update({buffer_of(read): read for read, other in ((left, right), (right, left)) if other in carrying})
    return [saved[buffer] for buffer in saved.keys() & inside]


def is_sink(stages: Stages, product: Node) -> bool:
    """Whether a product is smaller than what it is made from: nothing behind it needs it in backward."""
    largest = max(bytes_per_position(stages, node) for node in product.all_input_nodes if node in stages.placements.of)
    return bytes_per_position(stages, product) < largest


def footprint(body: Body, spec: tuple[Any, ...], length: int) -> Footprint:
    """Of the loop that runs a body.

    Args:
        body: of a full chunk.
        spec: a `loop_operator.LoopSpec`.
        length: positions of the whole axis.
    """
    chunk, ins = LoopSpec(*spec).chunk, LoopSpec(*spec).ins
    on_cpu = _inputs(body)[0].meta["val"].device.type == "cpu"
    results = sums = returned = native = cast = product = 0
    for kind, nodes in _by_result(body):
        value: torch.Tensor = nodes[0].meta["val"]
        if not isinstance(kind, Sum):
            results += _split_bytes(kind, value, chunk, length)
            continue
        pair = isinstance(kind, Outer)
        count = value.shape[1] * nodes[1].meta["val"].shape[1] if pair else value.numel()
        dtype, adds_up_in = kind.result, kind.adds_up_in(several=length > chunk)
        sums += count * adds_up_in.itemsize
        returned += count * dtype.itemsize
        native += count * value.itemsize
        if dtype != adds_up_in:
            cast = max(cast, count * dtype.itemsize)
        if pair and on_cpu and value.dtype != adds_up_in:  # it multiplies in one and adds up in another
            product = max(product, count * (value.itemsize + adds_up_in.itemsize))
    fixed = _whole_nodes(body)
    split = [(node, axis) for node, axis in zip(_inputs(body), ins, strict=True) if axis is not None]
    copied = sum(bytes_made(node) for node, axis in split if _is_copied(node, axis))
    once, twice = (_alive(body, fixed, times, reductions_apart=on_cpu, ordered=True) for times in (1, 2))
    each = (twice - once + copied) / chunk
    at_rest = product + sum(bytes_made(node) for node in {*map(buffer_of, _outputs(body))} if node.op != "placeholder")
    steady = round(max(once, at_rest) + copied - each * chunk)
    return Footprint(results, sums, cast, returned, native, max(0, steady), each)


def _by_result(body: Body) -> Iterator[tuple[ResultKind, list[Node]]]:
    """How each result of the loop is made, and the outputs of the body that it is made from."""
    outputs = iter(_outputs(body))
    for kind in body.outs:
        yield kind, list(islice(outputs, kind.outputs))


def _split_bytes(kind: Cat | Rows, value: torch.Tensor, chunk: int, length: int) -> int:
    """Of a result that is written chunk by chunk."""
    if isinstance(kind, Cat):
        return value.numel() * value.element_size() * length // chunk
    return prod(kind.shape(length)) * value.element_size()


def _alive(body: Body, fixed: set[Node], times: float, **how: Any) -> float:
    """Most bytes at once of the temporaries of `times` chunks taken as one; `how` as in `liveness.peak`."""

    def size(node: Node) -> float:
        return bytes_made(node) * (1 if node in fixed else times)

    return peak(body.module, size, **how)


def _whole(call: Call, length: int, *, early: bool) -> int:
    """Most bytes of the backward of a region that is not looped, gradients of weights left out.

    What is reduced is reduced in the forward.

    Args:
        call: of the region.
        length: positions of its axis.
        early: whether a gradient is multiplied as soon as its factors are there, and each of these has its own kernel.
    """
    if call.backward is None:
        return 0
    chunk = LoopSpec(*call.spec.backward_spec).chunk
    fixed = _whole_nodes(call.backward)
    outer = [(nodes[0], nodes[1]) for kind, nodes in _by_result(call.backward) if isinstance(kind, Outer)]
    pairs = outer if early else ()
    return round(_alive(call.backward, fixed, length / chunk, reductions_apart=True, ordered=False, multiplied=pairs))


def _outputs(body: Body) -> list[Node]:
    returned: Any = body.module.graph.output_node().args[0]
    return list(returned)


def _inputs(body: Body) -> list[Node]:
    return [node for node in body.module.graph.nodes if node.op == "placeholder"]


def _is_copied(node: Node, axis: tuple[int, int, int]) -> bool:
    """Whether a chunk of the operand does not lie in one piece."""
    dim, outer, _ = axis
    return outer * prod(node.meta["val"].shape[:dim]) > 1


def _whole_nodes(body: Body) -> set[Node]:
    """What a body computes of the size of a whole operand: its outputs that add up, and what only they are made of."""
    whole: set[Node] = set()
    for kind, (node, *_) in _by_result(body):
        while type(kind) is Sum and node.op == "call_function" and node not in whole:
            whole.add(node)
            operands = [operand for operand in node.all_input_nodes if bytes_made(operand) == bytes_made(node)]
            if node.target in CONTRACTIONS or len(operands) != 1:
                break
            (node,) = operands
    return whole
