"""The memory of a whole graph over one training step: what else is alive while a loop runs.

A step goes through the graph once forward and once back. The forward saves what the backward needs; the backward makes
gradients. `saved_activations` tells what the nodes outside the regions save; inside a checkpointed block it is alive
only while backward passes the block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias

from torch.fx import Node

FORWARD_DIVISOR = 2
"""The ratio of what the backward and the forward of a node need, besides the saved values.

Measured for a product whose result is as large as its operand (`tests/predict/test_step_memory.py`): backward makes the
gradients of both, forward makes only the result. For other nodes it is an assumption; no measurement of them is on
record. It decides a peak only where a checkpointed block saves more than backward needs of it: anywhere else backward
holds at least as much at the same segment.
"""


@dataclass(frozen=True)
class Held:
    """Bytes of one region, looped or not.

    Attributes:
        forward: most bytes at once in its forward.
        saved: bytes saved for its backward.
        backward: most bytes at once in its backward, besides the saved ones.
        saved_results: bytes of results that the checkpointed block around it saves and does not recompute.
    """

    forward: int = 0
    saved: int = 0
    backward: int = 0
    saved_results: int = 0


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of the graph outside the regions, or one region.

    Attributes:
        saved: bytes that the nodes save for backward.
        passing: most bytes that the backward of one of the nodes needs besides these.
        gradients: bytes of the gradients of graph inputs that backward makes here.
        upstream: bytes of the gradients that backward brings to a region from the nodes behind it.
        region: number of the region, None for other nodes.
        block: number of the checkpointed block around the segment, None outside of any.
        beside: number of the blocks side by side that the block is one of, None where it is none of any.
        entry: bytes that a checkpointed block saves, at its first segment.
        away: bytes of `entry`, or of what a loop in place of a checkpoint saves, that may go to the host.
        values: the nodes whose values make up `saved`, with the bytes of each; reports tell them.
        widest: the node that `passing` is about, None for a region.
    """

    saved: int = 0
    passing: int = 0
    gradients: int = 0
    upstream: int = 0
    region: int | None = None
    block: int | None = None
    beside: int | None = None
    entry: int = 0
    away: int = 0
    values: tuple[tuple[Node, int], ...] = field(default=(), compare=False)
    widest: Node | None = field(default=None, compare=False)


class Moment(NamedTuple):
    """Bytes alive while one segment runs, besides the inputs.

    Attributes:
        outputs: bytes of the graph's outputs.
        saved: bytes that segments have saved for backward, or recomputed for it.
        gradients: bytes of the gradients of graph inputs made so far.
        running: bytes that the segment needs itself.
    """

    outputs: int = 0
    saved: int = 0
    gradients: int = 0
    running: int = 0


class Share(NamedTuple):
    """What is saved of one segment at a moment.

    Attributes:
        segment: its number.
        entry: bytes of what a checkpointed block reads.
        whole: whether the values of the nodes outside the regions are there; in a checkpointed block, only while
            backward passes it.
        region: bytes of its region.
    """

    segment: int
    entry: int
    whole: bool
    region: int


class Stop(NamedTuple):
    """Segments of one block, of which something goes to the host and comes back, one block ahead of its use.

    Attributes:
        first, last: numbers of its segments.
        bytes: that go to the host.
    """

    first: int
    last: int
    bytes: int


@dataclass(frozen=True)
class Timeline:
    """What a graph holds over a step.

    Attributes:
        resident: bytes of its inputs: parameters, buffers, batch.
        segments: in the order of the forward.
        returned: bytes of its outputs, which the caller holds while backward runs.
        offloaded: number of blocks that keep nothing on the device, the first of those that `stops` gives.
    """

    resident: int
    segments: tuple[Segment, ...]
    returned: int = 0
    offloaded: int = 0

    @cached_property
    def stops(self) -> tuple[Stop, ...]:
        """The blocks that may keep what they save on the host, in the order of the forward."""
        found: list[Stop] = []
        for number, segment in enumerate(self.segments):
            inside = segment.block is not None and number > 0 and self.segments[number - 1].block == segment.block
            if inside and found and found[-1].last == number - 1:
                found[-1] = Stop(found[-1].first, number, found[-1].bytes + segment.away)
            else:
                found.append(Stop(number, number, segment.away))
        return tuple(stop for stop in found if stop.bytes)

    @property
    def side_by_side(self) -> int:
        """The number of checkpointed blocks that are side by side."""
        return len({segment.block for segment in self.segments if segment.beside is not None})

    def offloading(self, blocks: int) -> Timeline:
        """Return the same with so many blocks that keep nothing on the device."""
        return replace(self, offloaded=min(blocks, len(self.stops)))

    def absent(self, number: int, *, backward: bool) -> list[Stop]:
        """Return the blocks whose values are on the host alone while forward, or backward, runs a segment.

        A value leaves while its block runs. In backward the next one comes back as soon as one is asked for.
        """
        left = [stop for stop in self.stops[: self.offloaded] if stop.last < number]
        coming = backward and any(stop.last >= number for stop in self.stops[: self.offloaded])
        return left[:-1] if coming else left

    def _absent_bytes(self, number: int, *, backward: bool) -> int:
        return sum(stop.bytes for stop in self.absent(number, backward=backward)) if self.offloaded else 0

    def peak(self, held: Sequence[Held]) -> int:
        """Return the most bytes at once in a step, where `held` has the bytes of each region at its number."""
        held_segments = self._held(held)
        most = max(map(sum, self._forward(held_segments)), default=0)
        return self.resident + max(0, most, *map(sum, self._backward(held_segments)))

    def moments(self, held: Sequence[Held]) -> tuple[list[Moment], list[Moment]]:
        """Return what is alive while forward runs each segment, and while backward does: the last segment first.

        The last moment is the end of the step.
        """
        held_segments = self._held(held)
        return list(self._forward(held_segments)), list(self._backward(held_segments))

    def shares(self, held: Sequence[Held], number: int, *, backward: bool) -> list[Share]:
        """Return what each segment has saved while forward, or backward, runs the segment with this number."""
        own, found = self.segments[number].block if backward else None, []
        entered = (
            {segment.beside for segment in self.segments[number:] if segment.beside is not None} if backward else set()
        )
        absent = self.absent(number, backward=backward)
        for other, (segment, region) in enumerate(self._held(held)[: number + backward]):
            passing = segment.block is None or segment.block == own
            saved, whole = region.saved if passing else region.saved_results, passing or segment.beside in entered
            left = segment.away if any(stop.first <= other <= stop.last for stop in absent) else 0
            entry, saved = (segment.entry - left, saved) if segment.entry else (0, max(0, saved - left))
            found.append(Share(other, entry, whole, saved))
        return found

    def _held(self, held: Sequence[Held]) -> list[HeldSegment]:
        regions = [held[segment.region] if segment.region is not None else Held() for segment in self.segments]
        return list(zip(self.segments, regions, strict=True))

    def _forward(self, held_segments: Sequence[HeldSegment]) -> Iterator[Moment]:
        """Yield the bytes while each segment runs: what earlier segments left, and what it needs itself."""
        saved = 0
        for number, (segment, region) in enumerate(held_segments):
            there = saved - self._absent_bytes(number, backward=False)
            yield Moment(saved=there, running=max(region.forward, segment.passing // FORWARD_DIVISOR))
            saved += _left(segment, region)

    def _backward(self, held_segments: Sequence[HeldSegment]) -> Iterator[Moment]:
        """Yield the bytes while backward passes each segment, the last one first, and those after it.

        These are the outputs, the gradients of inputs made so far, what the segment and earlier ones saved, and what it
        needs itself. What a checkpointed block recomputes is saved from where backward enters the block; of blocks side
        by side, what their nodes outside the regions save, from where it enters the first one.
        """
        saved = sum(_left(segment, region) for segment, region in held_segments)
        again: Counter[int | None] = Counter()
        early: Counter[int] = Counter()
        for segment, region in held_segments:
            again[segment.block] += (
                region.saved - region.saved_results + (segment.saved if segment.beside is None else 0)
            )
            if segment.beside is not None:
                early[segment.beside] += segment.saved
        gradients, block = 0, None
        for number, (segment, region) in reversed(list(enumerate(held_segments))):
            if segment.block is not None and segment.block != block:
                saved += again[segment.block] + (early.pop(segment.beside, 0) if segment.beside is not None else 0)
            block = segment.block
            there = saved - self._absent_bytes(number, backward=True)
            yield Moment(self.returned, there, gradients, max(region.backward, segment.passing) + segment.upstream)
            gradients += segment.gradients
            saved -= segment.entry + segment.saved + region.saved
        yield Moment(gradients=gradients)


HeldSegment: TypeAlias = tuple[Segment, Held]
"""A segment, and what its region holds; nothing where it is no region."""


def _left(segment: Segment, region: Held) -> int:
    """Return the bytes that a segment has saved after it has run; inside a checkpointed block, only what that saves."""
    return segment.entry + (segment.saved + region.saved if segment.block is None else region.saved_results)
