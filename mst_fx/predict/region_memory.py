"""Bytes of a region as a function of the length of a mini-sequence, predicted from its graphs. No policy here.

A loop holds its results, the sums of what adds up, and the temporaries of one mini-sequence; a region that is not
looped holds the temporaries of all of them, and keeps the results of its matrix products for backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from mst_fx.bodies.call import Call
from mst_fx.bodies.work import Work
from mst_fx.core.aten_ops import VIEWS
from mst_fx.core.graph_walk import descendants
from mst_fx.core.sizes import Hint
from mst_fx.core.values import bytes_made
from mst_fx.kernels.liveness import buffer_of
from mst_fx.placement.partition import Stages
from mst_fx.placement.placement import split_of
from mst_fx.placement.rules.contraction import factors
from mst_fx.predict.footprint import NOTHING, Footprint, alive, by_result, footprint, whole_nodes
from mst_fx.runtime.loop_operator import LoopSpec
from mst_fx.runtime.result_kinds import Outer, Sum


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


def temporary_bytes(stages: Stages, length: int, at: Hint) -> int:
    """Bytes of the split values that the loop makes and does not return, for `length` positions of the axis.

    Views count nothing. It is what eager execution keeps for backward or frees at the region's end at the latest; a
    compiler that fuses elementwise ops makes fewer of them.
    """
    made = (node for node in stages.loop if node not in stages.results and node.target not in VIEWS)
    return sum(bytes_per_position(stages, node, at) for node in made) * length


def bytes_per_position(stages: Stages, node: Node, at: Hint) -> int:
    """Bytes of a split value for one position of the axis; 0 for a value that is not split."""
    split, value = split_of(stages.placements.of[node]), node.meta["val"]
    if split is None or not isinstance(value, torch.Tensor):
        return 0
    return at(value.numel()) // at(split.axis_length(value.shape)) * value.element_size()


def memory_of(work: Work, call: Call, at: Hint) -> RegionMemory:
    """Predict from the bodies of one length what every length takes; the axis has the length that `at` tells."""
    stages = work.stages
    length = at(stages.length)
    forward, backward = (
        footprint(body, spec, length, at) if body is not None else None
        for body, spec in ((call.forward, call.spec.forward_spec), (call.backward, call.spec.backward_spec))
    )
    in_forward = forward is None
    gradients = _gradients_saved(work, call, at) if in_forward else []
    saved_whole = sum(bytes_per_position(stages, node, at) for node in _saved_whole(work, at)) * length
    weights = backward.native if backward is not None else 0
    early, late = (weights + _whole(call, length, at, early=early) for early in (True, False))
    return RegionMemory(
        written=temporary_bytes(stages, length, at),
        forward=forward or backward or NOTHING,
        backward=None if in_forward else backward,
        saved=sum(saved for _, saved in gradients),
        scaled=sum(own for own, _ in gradients),
        rescaled=max((own for own, saved in gradients if own != saved), default=0),
        saved_whole=saved_whole,
        whole_forward=saved_whole if forward is None else forward.temporaries(length) + forward.left,
        whole_backward=early,
        whole_again=late,
        stream_gradient=_stream_gradient(work, at),
    )


def _gradients_saved(work: Work, call: Call, at: Hint) -> list[tuple[int, int]]:
    """Of each gradient that is made in the forward: its bytes as the operand's, and as it is kept for backward."""
    kinds = call.backward.outs[-len(work.wanted) :] if work.wanted and call.backward else ()
    values: list[torch.Tensor] = [work.stages.operands[i].meta["val"] for i in work.wanted]
    dtypes = [kind.result if isinstance(kind, Sum) else x.dtype for x, kind in zip(values, kinds, strict=True)]
    counts = [at(x.numel()) for x in values]
    return [(n * x.itemsize, n * dtype.itemsize) for n, x, dtype in zip(counts, values, dtypes, strict=True)]


def written_after(work: Work, chunk: int, at: Hint) -> int:
    """Bytes of the temporaries that a loop leaves of those written, and of the stream's gradient if it is large."""
    return temporary_bytes(work.stages, min(chunk, at(work.stages.length)), at) + _stream_gradient(work, at)


def _stream_gradient(work: Work, at: Hint) -> int:
    wanted = {work.stages.operands[i] for i in work.wanted}
    return bytes_made(work.stages.stream, at) if not work.stages.products and work.stages.stream in wanted else 0


def _saved_whole(work: Work, at: Hint) -> list[Node]:
    """What a region that is not looped saves for backward: its products, and what they read for a factor's gradient."""
    if work.backward == "none":
        return []
    stages = work.stages
    inside = set(stages.loop)
    carrying = descendants((stages.operands[i] for i in work.wanted), lambda node: inside.intersection(node.users))
    saved = {node: node for node in stages.products if node not in stages.results and not is_sink(stages, node, at)}
    for left, right in map(factors, stages.products):
        saved.update({buffer_of(read): read for read, other in ((left, right), (right, left)) if other in carrying})
    return [saved[buffer] for buffer in saved.keys() & inside]


def is_sink(stages: Stages, product: Node, at: Hint) -> bool:
    """Whether a product is smaller than what it is made from: nothing behind it needs it in backward."""
    largest = max(
        bytes_per_position(stages, node, at) for node in product.all_input_nodes if node in stages.placements.of
    )
    return bytes_per_position(stages, product, at) < largest


def _whole(call: Call, length: int, at: Hint, *, early: bool) -> int:
    """Most bytes of the backward of a region that is not looped, gradients of weights left out.

    What is reduced is reduced in the forward.

    Args:
        call: of the region.
        length: positions of its axis.
        at: tells sizes that vary.
        early: whether a gradient is multiplied as soon as its factors are there, and each of these has its own kernel.
    """
    if call.backward is None:
        return 0
    chunk = LoopSpec(*call.spec.backward_spec).chunk
    fixed = whole_nodes(call.backward, at)
    outer = [(nodes[0], nodes[1]) for kind, nodes in by_result(call.backward) if isinstance(kind, Outer)]
    pairs = outer if early else ()
    return round(
        alive(call.backward, fixed, length / chunk, at, reductions_apart=True, ordered=False, multiplied=pairs)
    )
