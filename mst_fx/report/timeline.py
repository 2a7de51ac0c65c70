"""What a graph holds over a training step, as numbers: with its loops and without any. Plain data; `plot` draws it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mst_fx.core.readable import readable
from mst_fx.report.lines import WIDTH, at, clipped, short, times

TOLD = 7
"""Number of rows that the text has for what is alive at the peaks."""
KINDS = {
    "parameters": "parameters",
    "inputs": "other inputs",
    "outputs": "outputs",
    "gradients": "gradients of parameters",
    "saved": "saved for backward",
    "running": "working memory",
    "other": "the rest",
}
"""Kinds of memory, and what texts call them."""


@dataclass(frozen=True)
class Alive:
    """Memory that is alive at a peak; values of one kind, of modules that are alike, are together.

    Attributes:
        kind: "parameters", "inputs" (others), "outputs", "gradients" (of parameters), "saved" (for backward), "running"
            (what the running part needs itself) or "other" (all that is too small to be listed).
        what: the op or the pattern that makes it; "" for what has none.
        module: path of the module that it belongs to; with * for numbers where several are alike.
        bytes: of all of it.
        count: number of values or regions.
    """

    kind: str
    what: str
    module: str
    bytes: int
    count: int = 1

    def __str__(self) -> str:
        told = KINDS[self.kind]
        return (
            f"{told}: {times(self.count)}{short(self.what)}{self.module and f' at {self.module}'}"
            if self.what
            else told
        )


@dataclass(frozen=True)
class Course:
    """The bytes alive over a step, besides parameters and inputs. Point by point, forward first, then backward.

    Attributes:
        outputs: bytes of the graph's outputs.
        gradients: bytes of the gradients of parameters made so far.
        saved: bytes that the forward has saved for the backward, or that are recomputed for it.
        running: bytes of what runs at the point: a region, or the op that needs most.
        at: where the peak is, in words.
        alive: what is alive at the peak, parameters and inputs included, the largest first.
    """

    outputs: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()
    saved: tuple[int, ...] = ()
    running: tuple[int, ...] = ()
    at: str = ""
    alive: tuple[Alive, ...] = ()

    def totals(self) -> list[int]:
        """Return the bytes at each point, without parameters and inputs."""
        return [sum(each) for each in zip(self.outputs, self.gradients, self.saved, self.running, strict=True)]


@dataclass(frozen=True)
class Span:
    """Where a region runs.

    Attributes:
        pattern, module: as in `LoopedRegion`.
        looped: whether it is looped.
        forward, backward: the points at which it runs, counted over the whole step from 0.
    """

    pattern: str
    module: str
    looped: bool
    forward: int
    backward: int


@dataclass(frozen=True)
class GraphTimeline:
    """What a graph holds over a predicted training step.

    A point is a part of the graph: a region, or what stands between two. Where there are many parts, a point is several
    of them, at that which holds most.

    Attributes:
        parameters: bytes of the parameters that the graph reads.
        inputs: bytes of its other inputs.
        forward: number of points of the forward; the others are of the backward, the last one is the end of the step.
        looped: bytes with the loops.
        whole: bytes without any.
        spans: where regions run.
    """

    parameters: int
    inputs: int
    forward: int
    looped: Course
    whole: Course
    spans: tuple[Span, ...] = ()

    def peak(self, course: Course) -> int:
        """Return the most bytes at once in one of the two courses."""
        return self.parameters + self.inputs + max(0, *course.totals())

    def without_loops(self) -> GraphTimeline:
        """Return the same for the graph as it was captured."""
        return replace(self, looped=self.whole, spans=tuple(replace(span, looped=False) for span in self.spans))


def peaks_of(timelines: tuple[GraphTimeline, ...]) -> tuple[Course, Course]:
    """Return the courses of the graphs with the highest peaks, without and with loops: both may be of one graph."""
    whole = max(timelines, key=lambda each: each.peak(each.whole)).whole
    return whole, max(timelines, key=lambda each: each.peak(each.looped)).looped


def rows_of(before: Course, after: Course) -> Iterator[str]:
    """Yield what is alive at the peaks of two courses, the largest first, with its bytes at both."""
    kinds: dict[tuple[str, str, str], list[Alive]] = {}
    sizes: dict[tuple[str, str, str], list[int]] = {}
    for place, course in enumerate((before, after)):
        for alive in course.alive:
            key = (alive.kind, alive.what, alive.module)
            kinds.setdefault(key, []).append(alive)
            sizes.setdefault(key, [0, 0])[place] = alive.bytes
    keys = sorted(kinds, key=lambda key: (key[0] == "other", -max(sizes[key])))
    rows = [(sizes[key], str(max(kinds[key], key=lambda alive: alive.bytes))) for key in keys]
    if len(rows) > TOLD:
        others = [each for each, _ in rows[TOLD - 1 :]]
        rows = [*rows[: TOLD - 1], ([sum(each[place] for each in others) for place in (0, 1)], KINDS["other"])]
    for (whole, looped), text in rows:
        columns = f"{readable(whole):>12}" + (f" -> {readable(looped):>10}" if before != after else "")
        yield clipped(f"{columns}  {text}", WIDTH)


def places_of(before: Course, after: Course) -> str:
    """Return where the peaks of two courses are, in words."""
    return before.at if before.at == after.at else f"{before.at} -> {after.at}"


def where(phase: str, what: str, module: str) -> str:
    """Return a place in a step, in words."""
    return f"{phase} of {short(what)} at {at(module)}" if what else phase
