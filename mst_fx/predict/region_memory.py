"""Bytes of a region as a function of the chunk length, predicted from its graphs. No policy here.

A loop holds its results, the sums over the chunks, and the temporaries of one chunk; a region that is not looped holds
the temporaries of the whole length, and saves the results of its matrix products for backward.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from mst_fx.bodies.call import Call
from mst_fx.bodies.work import Work
from mst_fx.core.aten_ops import LINEAR, VIEWS
from mst_fx.core.graph_walk import descendants
from mst_fx.core.sizes import Hint
from mst_fx.core.values import bytes_made, bytes_of
from mst_fx.kernels.liveness import buffer_of, peak
from mst_fx.ops.own_gradients import own_gradients, own_of, upstream
from mst_fx.placement.partition import Stages
from mst_fx.placement.placement import split_of
from mst_fx.placement.rules.contraction import factors
from mst_fx.predict.footprint import NOTHING, Footprint, alive, by_result, footprint, is_on_cpu, whole_nodes
from mst_fx.predict.step_memory import FORWARD_DIVISOR
from mst_fx.runtime.loop_operator import LoopSpec
from mst_fx.runtime.overwriting import overwritable
from mst_fx.runtime.result_kinds import Outer, Sum

aten = torch.ops.aten


@dataclass(frozen=True)
class RegionMemory:
    """Bytes of a region, looped or not.

    Attributes:
        written: bytes of the temporaries of the whole region as its program writes them, before any fusion.
        forward: bytes of the loop in the forward; with the gradients, where they are made in the forward.
        backward: bytes of the loop in the backward, None where there is none.
        saved: bytes that the loop saves for backward, besides what the region reads.
        saved_whole: the same without a loop.
        scaled: bytes of the gradients that are made in the forward, as backward returns them.
        rescaled: bytes of the largest gradient that is made in the forward and that backward casts while it scales it;
            it scales the others in place.
        whole_forward, whole_backward: most bytes at once without a loop, with results and gradients.
        whole_again: the same in the backward, where the saved values are recomputed right before it; the kernels of the
            backward make them, too.
        stream_gradient: bytes of the stream's gradient, where the stream itself is large and the loop has no product
            that makes it from a smaller value.
        prologue: bytes of what is made once in front of the loop and read by every chunk: weights that are unpacked or
            cast. They are there as long as a loop runs, in the forward and in the backward.
    """

    written: int
    forward: Footprint = NOTHING
    backward: Footprint | None = None
    saved: int = 0
    scaled: int = 0
    rescaled: int = 0
    saved_whole: int = 0
    whole_forward: int = 0
    whole_backward: int = 0
    whole_again: int = 0
    stream_gradient: int = 0
    prologue: int = 0

    def unlooped_as(self, saved: int, passing: int) -> RegionMemory:
        """Return the same with these bytes saved without a loop, and needed besides in backward."""
        both = saved + passing
        whole = saved + passing // FORWARD_DIVISOR
        return replace(self, saved_whole=saved, whole_forward=whole, whole_backward=both, whole_again=both)


def temporary_bytes(stages: Stages, length: int, at: Hint) -> int:
    """Return the bytes of the split values that the loop makes and does not return, for `length` positions of the axis.

    Views count nothing. Eager execution saves these values for backward, or frees them by the end of the region; a
    compiler that fuses elementwise ops makes fewer of them.
    """
    made = (node for node in stages.loop if node not in stages.results and node.target not in VIEWS)
    return sum(bytes_per_position(stages, node, at) for node in made) * length


def bytes_per_position(stages: Stages, node: Node, at: Hint) -> int:
    """Return the bytes of a split value for one position of the axis; 0 for a value that is not split."""
    split, value = split_of(stages.placements.of[node]), node.meta["val"]
    if split is None or not isinstance(value, torch.Tensor):
        return 0
    return at(value.numel()) // at(split.axis_length(value.shape)) * value.element_size()


def memory_of(work: Work, call: Call, at: Hint) -> RegionMemory:
    """Predict a region's bytes for every chunk length from the bodies of one; the axis is as long as `at` tells."""
    stages = work.stages
    length = at(stages.length)
    forward, backward = (
        footprint(body, spec, length, at) if body is not None else None
        for body, spec in ((call.forward, call.spec.forward_spec), (call.backward, call.spec.backward_spec))
    )
    if backward is not None:
        backward = replace(backward, results=backward.results - _overwritten(work, call, at))
    in_forward = forward is None
    gradients = _gradients_saved(work, call, at) if in_forward else []
    saved_whole = _saved_whole_bytes(work, at)
    weights = backward.native if backward is not None else 0
    whole_backward, whole_again = (
        weights + _whole_backward(call, length, at, at_once=at_once) for at_once in (True, False)
    )
    return RegionMemory(
        written=temporary_bytes(stages, length, at),
        forward=forward or backward or NOTHING,
        backward=None if in_forward else backward,
        saved=sum(saved for _, saved in gradients) + _kept(work, at),
        scaled=sum(own for own, _ in gradients),
        rescaled=max((own for own, saved in gradients if own != saved), default=0),
        saved_whole=saved_whole,
        whole_forward=_whole_forward(work, at),
        whole_backward=whole_backward,
        whole_again=whole_again,
        stream_gradient=_stream_gradient(work, at),
        prologue=sum(bytes_made(node, at) for node in stages.operands if node in stages.prologue),
    )


def memory_unlooped(work: Work, at: Hint) -> RegionMemory:
    """Predict the bytes of a region that is not looped in any case, without its bodies: those that it saves."""
    saved = _saved_whole_bytes(work, at)
    written = temporary_bytes(work.stages, at(work.stages.length), at)
    return RegionMemory(
        written, saved_whole=saved, whole_forward=_whole_forward(work, at), whole_backward=saved, whole_again=saved
    )


def _whole_forward(work: Work, at: Hint) -> int:
    """Return the most bytes at once in the forward of a region without a loop, with what it saves and its outputs."""
    stages, saved = work.stages, _saved_whole(work, at)
    made = set(stages.prologue).union(stages.loop, stages.epilogue)
    on_cpu = is_on_cpu(stages.stream)

    def size(node: Node) -> int:
        return bytes_made(node, at) if node in made and node.target != own_gradients else 0

    most = peak(stages.graph, size, reductions_apart=on_cpu, costly_once=on_cpu, ordered=False, kept=saved)
    return max(_saved_whole_bytes(work, at), round(most))


def _overwritten(work: Work, call: Call, at: Hint) -> int:
    """Return the bytes of the gradient that is written over a value that the loop has saved for its backward alone."""
    stages, spec = work.stages, LoopSpec(*call.spec.backward_spec)
    alone = {stages.results[i] for i in work.reused}.difference(stages.outputs)
    if not alone:
        return 0
    read = [*(stages.ends[i] for i in (*work.differentiable, *work.reused)), *stages.operands]
    values = [node.meta["val"] for node in work.differentiated]
    pairs = overwritable(spec.outs, spec.ins, values, [node.meta["val"] for node in read])
    return next((bytes_of(values[result], at) for result, operand in pairs if read[operand] in alone), 0)


def _kept(work: Work, at: Hint) -> int:
    """Return the bytes of the results that the loop saves for its own backward alone, and the region does not give."""
    results = work.stages.results
    return sum(bytes_made(results[i], at) for i in work.reused if results[i] not in work.stages.outputs)


def _saved_whole_bytes(work: Work, at: Hint) -> int:
    per_position = sum(bytes_per_position(work.stages, node, at) for node in _saved_whole(work, at))
    return per_position * at(work.stages.length)


def _gradients_saved(work: Work, call: Call, at: Hint) -> list[tuple[int, int]]:
    """Return, for each gradient made in the forward, its bytes in the operand's dtype and in the dtype saved."""
    kinds = call.backward.outs[-len(work.wanted) :] if work.wanted and call.backward else ()
    values: list[torch.Tensor] = [node.meta["val"] for node in work.differentiated]
    dtypes = [kind.result if isinstance(kind, Sum) else x.dtype for x, kind in zip(values, kinds, strict=True)]
    counts = [at(x.numel()) for x in values]
    return [(n * x.itemsize, n * dtype.itemsize) for n, x, dtype in zip(counts, values, dtypes, strict=True)]


def written_after(work: Work, chunk: int, at: Hint) -> int:
    """Return the bytes of the temporaries of a chunk of `chunk` positions, plus those of a large stream's gradient."""
    return temporary_bytes(work.stages, min(chunk, at(work.stages.length)), at) + _stream_gradient(work, at)


def _stream_gradient(work: Work, at: Hint) -> int:
    makes_it = not work.stages.products and work.stages.stream in work.differentiated
    return bytes_made(work.stages.stream, at) if makes_it else 0


def _saved_whole(work: Work, at: Hint) -> list[Node]:
    """Return what a region without a loop saves for backward: its products, and what the gradients of factors read."""
    if work.backward == "none":
        return []
    stages = work.stages
    inside = set(stages.loop)
    carrying = descendants(work.differentiated, lambda node: inside.intersection(node.users))
    saved = {node: node for node in stages.products if node not in stages.results and not is_sink(stages, node, at)}
    for left, right in map(factors, stages.products):
        saved.update({buffer_of(read): read for read, other in ((left, right), (right, left)) if other in carrying})
    kept = [saved[buffer] for buffer in stages.loop if buffer in saved]
    return _summed(stages, kept, at)


def _summed(stages: Stages, saved: list[Node], at: Hint) -> list[Node]:
    """Return what is saved in place of values that only a sum reads: the sum, as of a product and an adapter's."""
    kept = dict.fromkeys(saved)
    for node in stages.loop:
        taken = [operand for operand in _read_by(node) if operand in kept and _readers(operand) == [node]]
        size = sum(bytes_per_position(stages, operand, at) for operand in taken)
        scales = node.target is aten.mul.Tensor and not isinstance(node.args[1], Node)
        adds = (node.target in LINEAR or scales) and node not in stages.results
        if taken and adds and bytes_per_position(stages, node, at) <= size:
            kept = dict.fromkeys([*(each for each in kept if each not in taken), node])
    return list(kept)


def _read_by(node: Node) -> list[Node]:
    """Return what a node reads; of a function that brings its gradients, the value that the function hands on."""
    if node.target is operator.getitem and isinstance(node.args[0], Node) and node.args[0].target == own_gradients:
        position: Any = node.args[1]
        return [own_of(node.args[0]).values[position]]
    return node.all_input_nodes


def _readers(node: Node) -> list[Node]:
    """Return the nodes that read a value; in place of a function that hands it on, those that take it from there."""
    functions = [user for user in node.users if user.target == own_gradients]
    others = [user for user in node.users if user.target not in (own_gradients, upstream)]
    return others + [taker for function in functions for taker in function.users if _read_by(taker) == [node]]


def is_sink(stages: Stages, product: Node, at: Hint) -> bool:
    """Return whether a product is smaller than an operand: no later node needs it in backward."""
    largest = max(
        bytes_per_position(stages, node, at) for node in product.all_input_nodes if node in stages.placements.of
    )
    return bytes_per_position(stages, product, at) < largest


def _whole_backward(call: Call, length: int, at: Hint, *, at_once: bool) -> int:
    """Return the most bytes at once in the backward of a region without a loop, except gradients of weights.

    The forward has computed its reductions.

    Args:
        call: the call of the region's loop.
        length: positions of the axis.
        at: tells sizes that vary.
        at_once: whether a product runs as soon as its factors are there, and each of these has its own kernel.
    """
    if call.backward is None:
        return 0
    chunk = LoopSpec(*call.spec.backward_spec).chunk
    fixed = whole_nodes(call.backward, at)
    outer = [(nodes[0], nodes[1]) for kind, nodes in by_result(call.backward) if isinstance(kind, Outer)]
    pairs = outer if at_once else ()
    return round(
        alive(call.backward, fixed, length / chunk, at, reductions_apart=True, ordered=False, multiplied=pairs)
    )
