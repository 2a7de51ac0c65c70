"""The memory of a whole graph over one training step, region by region: what else is alive while a loop runs.

A step goes through the graph once forward and once back. What backward needs is saved on the way; what backward makes
is a gradient. Outside the regions a compiler saves what is dear to compute again (products, attention, unknown ops) and
what these and the regions read, and fuses or recomputes the rest: that is the model here. Inside a checkpointed block
all of it is only alive while backward passes the block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from mst_fx.body import HALF
from mst_fx.lower import fake_value, hint
from mst_fx.reading import Reader, tensors_of
from mst_fx.rules import rule_for
from mst_fx.rules.contraction import CONTRACTIONS

aten = torch.ops.aten


@dataclass(frozen=True)
class Held:
    """Bytes of one region, looped or not.

    Attributes:
        forward: most at once in its forward.
        saved: kept for its backward.
        backward: most at once in its backward, besides what is saved.
        kept: results that the checkpointed block around it saves, and does not compute again.
    """

    forward: int = 0
    saved: int = 0
    backward: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Segment:
    """A stretch of the graph: nodes outside the regions, or one region.

    Attributes:
        saved: bytes kept for backward by the nodes.
        passing: most bytes that one of the nodes needs beside that, in backward.
        gradients: bytes of the gradients of graph inputs that backward makes here.
        region: number of the region that this is, None for other nodes.
        block: number of the checkpointed block around it, None outside of any.
        entry: bytes that a checkpointed block saves, at its first segment.
    """

    saved: int = 0
    passing: int = 0
    gradients: int = 0
    region: int | None = None
    block: int | None = None
    entry: int = 0


@dataclass(frozen=True)
class Timeline:
    """What a graph holds over a step.

    Attributes:
        resident: bytes of its inputs: parameters, buffers, batch.
        segments: in the order of the forward.
        returned: bytes of its results, which the caller holds while backward runs.
    """

    resident: int
    segments: tuple[Segment, ...]
    returned: int = 0

    def peak(self, held: Sequence[Held]) -> int:
        """Most bytes at once in a step, with the regions as `held` says, by their numbers."""
        regions = [held[part.region] if part.region is not None else Held() for part in self.segments]
        parts = [(part, region, part.saved + region.saved) for part, region in zip(self.segments, regions, strict=True)]
        alive = peak = self.resident
        again: Counter[int | None] = Counter()
        for segment, region, saved in parts:
            peak = max(peak, alive + max(region.forward, segment.passing // 2))
            alive += segment.entry + (saved if segment.block is None else region.kept)
            again[segment.block] += saved - region.kept
        alive += self.returned
        gradients, block = 0, None
        for segment, region, saved in reversed(parts):
            if segment.block is not None and segment.block != block:
                alive += again[segment.block]
            block = segment.block
            peak = max(peak, alive + gradients + max(region.backward, segment.passing))
            gradients += segment.gradients
            alive -= segment.entry + saved
        return max(peak, self.resident + gradients)


def segments_of(
    reader: Reader,
    regions: Mapping[Node, int],
    blocks: Mapping[Node, Sequence[Segment]],
    results: Mapping[int, int],
    *,
    top: bool,
) -> list[Segment]:
    """The segments of one graph.

    Args:
        reader: of the graph.
        regions: the number of the region of each node that belongs to one.
        blocks: the segments of the subgraphs that nodes of the graph run (checkpointed blocks and the like).
        results: bytes of what each region gives.
        top: whether the graph's inputs are those of the whole; a subgraph's gradients are its caller's.
    """
    last = _last_readers(reader) if top else {}
    found: list[Segment] = []
    place: dict[int, int] = {}
    current = Segment()
    for node in reader.owner.graph.nodes:
        gradients = last.get(node, 0)
        if node in regions:
            number = regions[node]
            if number not in place:
                found += [current, Segment(region=number)]
                place[number] = len(found) - 1
                current = Segment(saved=results[number])
            at = place[number]
            found[at] = replace(found[at], gradients=found[at].gradients + gradients)
        elif node in blocks:
            inner = list(blocks[node]) or [Segment()]
            inner[0] = replace(inner[0], entry=inner[0].entry + _activation_bytes(node))
            inner[-1] = replace(inner[-1], gradients=inner[-1].gradients + gradients)
            found += [current, *inner]
            current = Segment()
        else:
            saved, passing = _saved_by(reader, node, regions)
            current = replace(
                current,
                saved=current.saved + saved,
                passing=max(current.passing, passing),
                gradients=current.gradients + gradients,
            )
    return [*found, current]


def resident_bytes(reader: Reader) -> int:
    """Bytes of the graph's inputs, shared memory counted once."""
    return _storage_bytes(reader, _inputs(reader))


def returned_bytes(reader: Reader) -> int:
    """Bytes of the graph's results, shared memory counted once."""
    return _storage_bytes(reader, reader.owner.graph.output_node().all_input_nodes)


def _storage_bytes(reader: Reader, nodes: Sequence[Node]) -> int:
    storages = set().union(*map(reader.storages, nodes))
    return sum(hint(storage.nbytes()) for storage in storages)


def _inputs(reader: Reader) -> list[Node]:
    return [node for node in reader.owner.graph.nodes if node.op in ("placeholder", "get_attr")]


def _last_readers(reader: Reader) -> dict[Node, int]:
    """Bytes of the gradients of graph inputs, by the last node that reads them: there backward makes them first."""
    gradients: dict[Node, int] = {}
    for node in _inputs(reader):
        value = fake_value(node)
        if isinstance(value, torch.nn.Parameter) and value.requires_grad and node.users:
            last = max(node.users, key=reader.order.__getitem__)
            gradients[last] = gradients.get(last, 0) + _bytes(value)
    return gradients


ATTENTION = 3
"""Attention's backward holds so many times what it reads and makes: gradients, and sums of them in float32."""


def _saved_by(reader: Reader, node: Node, regions: Container[Node]) -> tuple[int, int]:
    """Bytes that a node outside the regions saves for backward, and that its backward needs beside them.

    Args:
        reader: of the graph.
        node: outside the regions.
        regions: the nodes of the regions.
    """
    values = [x for x in tensors_of(node) if x.requires_grad]
    if node.op in ("placeholder", "get_attr", "output") or not values:
        return 0, 0
    made = sum(map(_bytes, values))
    if reader.does(node, (aten.embedding.default, aten.index.Tensor)):  # rows of a table: it adds up in float32
        tables = [
            x for operand in node.all_input_nodes for x in tensors_of(operand) if isinstance(x, torch.nn.Parameter)
        ]
        return 0, sum(4 * hint(x.numel()) + _bytes(x) for x in tables if x.dtype in HALF)
    if _is_dear(reader, node):
        return made, (made + _activation_bytes(node)) * (1 if reader.multiplies(node) else ATTENTION)
    needed = any(user in regions or _is_dear(reader, user) for user in node.users)
    return (made if needed and not reader.is_view(node) else 0), 0


def _is_dear(reader: Reader, node: Node) -> bool:
    """Whether a compiler would rather save a node's result than compute it once more."""
    ops = reader.ops(node)
    return ops is None or any(op in CONTRACTIONS or rule_for(op) is None for op in ops)


def _activation_bytes(node: Node) -> int:
    """Bytes of the operands that carry gradients and are no parameters."""
    values = [x for operand in node.all_input_nodes for x in tensors_of(operand)]
    return sum(_bytes(x) for x in values if x.requires_grad and not isinstance(x, torch.nn.Parameter))


def _bytes(value: torch.Tensor) -> int:
    return hint(value.numel()) * value.element_size()
