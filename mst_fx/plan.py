"""Region + stages + options -> how many chunks, and which way backward. Policy lives here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch.fx import Node

from mst_fx.body import differentiable_results
from mst_fx.config import Config
from mst_fx.lower import hint
from mst_fx.memory import temporary_bytes
from mst_fx.placement import PARTIAL, WHOLE, split_of
from mst_fx.refusal import Reason, Refusal
from mst_fx.region import Region, needs_gradient
from mst_fx.rules import shape_of
from mst_fx.rules.contraction import CONTRACTIONS, factors
from mst_fx.stages import Stages

Backward = Literal["recompute", "in_forward", "none"]

CHUNK_BYTES = {"float32": 2**30, "native": 2**29}
"""Aim for the widest matrix product of a chunk (bytes): a float32 accumulator is twice the traffic a chunk, so half as
many chunks cost the same."""
MIN_ROWS, MAX_ROWS = 1024, 7680
"""Rows that a matrix meets in a chunk: one a token, fewer where tokens are shared out among experts.

Below, matmuls lose speed; above, they gain less than 1 % for memory in proportion (SwiGLU of 8B, H200)."""
FORWARD_FACTOR = 2
"""A forward chunk needs a third of the memory that its gradients need, so a recomputing region's may be longer."""
ALIGNMENT = 16
"""Chunk lengths are multiples of it where there is a choice, so that every chunk starts aligned."""


@dataclass(frozen=True)
class Plan:
    """The decision for one region.

    Attributes:
        chunk: positions of the split axis in one mini-sequence of the loop that computes gradients, if any.
        forward_chunk: the same for the loop that computes results only.
        chunks: number of mini-sequences, the ragged one included (of the length captured, where that may vary).
        backward: how gradients are made.
        wanted: positions of the loop's operands that get a gradient.
        differentiable: positions of the loop's results that have one.
        bytes_before, bytes_after: of the region's temporaries, whole and for one chunk.
        detached: large values that the graph returns, and that carry no gradient.
        kept: positions of the results that backward reads in place of computing them again.
    """

    chunk: int
    forward_chunk: int
    chunks: int
    backward: Backward
    wanted: tuple[int, ...]
    differentiable: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    detached: tuple[Node, ...] = ()
    kept: tuple[int, ...] = ()


def make_plan(region: Region, stages: Stages, needs_grad: dict[Node, bool], config: Config) -> Plan:
    """Decide for one region.

    Args:
        region: for messages.
        stages: the cut aten graph.
        needs_grad: for each operand of the loop whether a gradient is needed.
        config: the user's options.

    Raises:
        Refusal: the region is smaller than `min_bytes`.
    """
    length = hint(stages.length)
    before = temporary_bytes(stages, length)
    if before < config.min_bytes:
        text = f"its temporaries are {before:,} bytes, min_bytes is {config.min_bytes:,}"
        raise Refusal(Reason.SMALL, region.last, text)
    chunk = _chunk(stages, config)
    wanted = tuple(i for i, node in enumerate(stages.operands) if needs_grad[node])
    detached = region.returned if config.returned_logits == "detach" else ()
    differentiable = _differentiable(region, stages, wanted, detached) if wanted else ()
    backward = _backward(stages, differentiable)
    chosen = config.chunk_tokens is None and config.num_chunks is None
    longer = _bounded(stages, FORWARD_FACTOR * chunk) if chosen and backward == "recompute" else chunk
    return Plan(
        chunk=chunk,
        forward_chunk=longer,
        chunks=-(-length // chunk),
        backward=backward,
        wanted=wanted if differentiable else (),
        differentiable=differentiable,
        bytes_before=before,
        bytes_after=temporary_bytes(stages, min(chunk, length)) + _large_gradient_bytes(stages, needs_grad),
        detached=detached,
        kept=_kept(region, stages, differentiable) if backward == "recompute" else (),
    )


def _large_gradient_bytes(stages: Stages, needs_grad: dict[Node, bool]) -> int:
    """Of the stream's gradient, where the stream itself is large: nothing in the loop makes it from less."""
    if _multiplies(stages) or not needs_grad.get(stages.stream):
        return 0
    value: torch.Tensor = stages.stream.meta["val"]
    return hint(value.numel()) * value.element_size()


def _kept(region: Region, stages: Stages, differentiable: tuple[int, ...]) -> tuple[int, ...]:
    """Values that are returned as they are exist anyway: their product need not run twice."""
    large = [outer in region.returned and any(user.op == "output" for user in outer.users) for outer in region.outputs]
    returned = {inner for inner, is_large in zip(stages.outputs, large, strict=True) if is_large}
    return tuple(i for i in differentiable if stages.results[i] in returned)


def _multiplies(stages: Stages) -> bool:
    return any(node.target in CONTRACTIONS for node in stages.loop)


def _differentiable(
    region: Region, stages: Stages, wanted: tuple[int, ...], detached: tuple[Node, ...]
) -> tuple[int, ...]:
    """Positions of the loop's results from which a gradient can come back."""
    inside = set(region.nodes)
    outputs = zip(region.outputs, stages.outputs, strict=True)
    ends = [inner for outer, inner in outputs if needs_gradient(outer, inside) and outer not in detached]
    reached = stages.results_behind(ends)
    if not reached:
        return ()
    return tuple(i for i in differentiable_results(stages, wanted) if stages.results[i] in reached)


def _backward(stages: Stages, differentiable: tuple[int, ...]) -> Backward:
    """Gradients come in the forward where one scalar comes out, and recomputing it would cost a matrix product.

    fp16 needs the true upstream scale: it recomputes.
    """
    if not differentiable:
        return "none"
    sink = stages.results[differentiable[0]]
    scalar = len(differentiable) == 1 and stages.placements.of[sink] == PARTIAL and sink.meta["val"].numel() == 1
    half = any(node.meta["val"].dtype == torch.float16 for node in (*stages.loop, *stages.operands) if _is_tensor(node))
    return "in_forward" if scalar and _multiplies(stages) and not half else "recompute"


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _chunk(stages: Stages, config: Config) -> int:
    """Positions in one chunk: as the user says, else about CHUNK_BYTES in its widest product; the chunks are even."""
    if config.num_chunks is not None:
        return max(1, -(-hint(stages.length) // config.num_chunks))
    per_position = _tokens_per_position(stages)
    if config.chunk_tokens is not None:
        return _bounded(stages, max(1, config.chunk_tokens // per_position))
    products = [node for node in stages.loop if node.target in CONTRACTIONS]
    widest = max(_bytes_per_position(stages, node) for node in products or stages.loop)
    tokens = max(1, CHUNK_BYTES[config.accumulate] * per_position // max(1, widest))
    sharing = max([1.0, *(_tokens_per_row(stages, node) for node in products)])
    tokens = int(min(MAX_ROWS * sharing, max(MIN_ROWS * sharing, 1 << (tokens.bit_length() - 1))))
    length = max(1, tokens // per_position)
    if stages.dynamic:
        return length
    chunks = -(-stages.length // length)
    even = -(-stages.length // chunks)
    return _bounded(stages, -(-even // ALIGNMENT) * ALIGNMENT)


def _bounded(stages: Stages, chunk: int) -> int:
    return chunk if stages.dynamic else min(stages.length, chunk)


def _tokens_per_position(stages: Stages) -> int:
    """Rows of the stream behind one position of the axis: the batch, where the axis is the sequence."""
    return max(1, hint(prod(shape_of(stages.stream)[:-1])) // hint(stages.length))


def _tokens_per_row(stages: Stages, product: Node) -> float:
    """Tokens for each row that one of the product's matrices meets, where it has one for each group; else 0."""
    weight = factors(product)[1]
    if stages.placements.of[weight] != WHOLE or len(shape_of(weight)) != 3:
        return 0.0
    rows = hint(prod(shape_of(product)[:-1]))
    return shape_of(weight)[0] * hint(prod(shape_of(stages.stream)[:-1])) / rows


def _bytes_per_position(stages: Stages, node: Node) -> int:
    split, value = split_of(stages.placements.of[node]), node.meta["val"]
    if split is None or not isinstance(value, torch.Tensor):
        return 0
    return hint(value.numel()) * value.element_size() // hint(split.axis_length(value.shape))
