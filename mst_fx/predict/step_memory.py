"""The memory of a whole graph over one training step, region by region: what else is alive while a loop runs.

A step goes through the graph once forward and once back. What backward needs is saved on the way; what backward makes
is a gradient. What the nodes outside the regions save is told in `saved_activations`; inside a checkpointed block it is
only alive while backward passes the block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch.fx import Node

from mst_fx.core.sizes import hint
from mst_fx.core.values import bytes_of, fake_value, storages_of_all
from mst_fx.predict.saved_activations import activation_bytes, passing_bytes, saved_values
from mst_fx.recognise.reader import Reader

FORWARD_DIVISOR = 2
"""What backward needs of a node beside the saved values, by what its forward needs beside them.

Measured for a product whose result is as large as what it reads (`tests/predict/test_step_memory.py`): backward makes
the gradients of both, forward makes the result alone. For other nodes it is an assumption; no measurement of them is on
record. It decides a peak only where a checkpointed block keeps more than backward needs of it: anywhere else backward
holds at least as much at the same segment.
"""


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
        parts = list(zip(self.segments, regions, strict=True))
        return max(self.resident, *self._forward(parts), *self._backward(parts))

    def _forward(self, parts: Sequence[Part]) -> Iterator[int]:
        """Bytes while each segment runs: the inputs, what the segments in front have left, and what it needs itself."""
        alive = self.resident
        for segment, region in parts:
            yield alive + max(region.forward, segment.passing // FORWARD_DIVISOR)
            alive += _left(segment, region)

    def _backward(self, parts: Sequence[Part]) -> Iterator[int]:
        """Bytes while backward passes each segment, the last one first, and when it is over.

        These are the inputs and the results, the gradients of inputs that are there by now, what is saved by the
        segment and those in front, and what it needs itself. What a checkpointed block computes again is saved from
        where backward enters the block.
        """
        alive = self.resident + self.returned + sum(_left(segment, region) for segment, region in parts)
        again: Counter[int | None] = Counter()
        for segment, region in parts:
            again[segment.block] += segment.saved + region.saved - region.kept
        gradients, block = 0, None
        for segment, region in reversed(parts):
            if segment.block is not None and segment.block != block:
                alive += again[segment.block]
            block = segment.block
            yield alive + gradients + max(region.backward, segment.passing)
            gradients += segment.gradients
            alive -= segment.entry + segment.saved + region.saved
        yield self.resident + gradients


Part: TypeAlias = tuple[Segment, Held]
"""A segment, and what its region holds; nothing where it is none."""


def _left(segment: Segment, region: Held) -> int:
    """Bytes that a segment leaves behind when it has run; inside a checkpointed block, only what the block keeps."""
    return segment.entry + (segment.saved + region.saved if segment.block is None else region.kept)


def segments_of(
    reader: Reader,
    regions: Mapping[Node, int],
    blocks: Mapping[Node, Sequence[Segment]],
    *,
    top: bool,
) -> list[Segment]:
    """The segments of one graph.

    Args:
        reader: of the graph.
        regions: the number of the region of each node that belongs to one.
        blocks: the segments of the subgraphs that nodes of the graph run (checkpointed blocks and the like).
        top: whether the graph's inputs are those of the whole; a subgraph's gradients are its caller's.
    """
    last = _last_readers(reader) if top else {}
    saved = saved_values(reader, regions, blocks)
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
                current = Segment()
            current = replace(current, saved=current.saved + saved.get(node, 0))
            at = place[number]
            found[at] = replace(found[at], gradients=found[at].gradients + gradients)
        elif node in blocks:
            inner = list(blocks[node]) or [Segment()]
            inner[0] = replace(inner[0], entry=inner[0].entry + activation_bytes(node))
            inner[-1] = replace(inner[-1], gradients=inner[-1].gradients + gradients)
            found += [current, *inner]
            current = Segment(saved=saved.get(node, 0))
        else:
            current = replace(
                current,
                saved=current.saved + saved.get(node, 0),
                passing=max(current.passing, passing_bytes(reader, node)),
                gradients=current.gradients + gradients,
            )
    return [*found, current]


def resident_bytes(reader: Reader) -> int:
    """Bytes of the graph's inputs, shared memory counted once."""
    return _storage_bytes(_inputs(reader))


def returned_bytes(reader: Reader) -> int:
    """Bytes of the graph's results, shared memory counted once."""
    return _storage_bytes(reader.owner.graph.output_node().all_input_nodes)


def _storage_bytes(nodes: Sequence[Node]) -> int:
    storages = storages_of_all(nodes)
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
            gradients[last] = gradients.get(last, 0) + bytes_of(value)
    return gradients
