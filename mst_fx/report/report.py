"""The report: what is looped, what is not, and why. It is plain data, and `str()` gives its text."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from mst_fx.core.module_paths import module_path
from mst_fx.core.provenance import op_name, source_line
from mst_fx.core.readable import readable
from mst_fx.core.refusal import Refusal
from mst_fx.core.torch_private.captured import Attempt, attempt
from mst_fx.report.unlooped import Unlooped, joined, largest, text_of


@dataclass(frozen=True)
class LoopedRegion:
    """A region that runs as a loop.

    Attributes:
        pattern: name of the pattern that recognised it.
        module: path of the innermost module that holds its projections: an MLP, or the projection of a head.
        source: file, line and code of its last op.
        axis: the split dim of the stream, and its length in positions.
        chunks: number of mini-sequences.
        bytes_before, bytes_after: bytes of the region's temporaries, unlooped and with one chunk alive.
        backward: "recompute", "in_forward" or "none".
        added_ms: predicted milliseconds that the loop adds to a training step.
        returned_bytes: bytes of logits that the compiled function returns, so that they exist as a whole.
        returned_gradient_bytes: bytes of their gradient, with which backward starts even if nobody used them.
        verified: with the option `verify`, True for a loop that ran and is right, False for one that could not run.
        verification: at which sizes it ran, or why it could not.
    """

    pattern: str
    module: str
    source: str
    axis: str
    chunks: int
    bytes_before: int
    bytes_after: int
    backward: str
    added_ms: float = 0.0
    returned_bytes: int = 0
    returned_gradient_bytes: int = 0
    verified: bool | None = None
    verification: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.pattern} at {self.module or 'the top'}: {self.axis} in {self.chunks} chunks, "
            f"{readable(self.bytes_before)} -> {readable(self.bytes_after)} of temporaries, "
            f"backward {self.backward.replace('_', ' ')}, {self.added_ms:+.1f} ms a step (predicted)",
            self.source,
        ]
        if self.returned_bytes:
            size = readable(self.returned_bytes)
            lines.append(
                f"Returned logits have to exist: {size}; returned_logits='drop' does without them in training."
            )
        if self.returned_gradient_bytes:
            size = readable(self.returned_gradient_bytes)
            lines.append(f"Backward starts with their gradient, {size}; returned_logits='detach' does without it.")
        if self.verified is not None:
            lines.append(f"{'Verified at' if self.verified else 'Could not be verified:'} {self.verification}.")
        return "\n    ".join(lines)


@dataclass(frozen=True)
class RefusedRegion:
    """A region, or what looked like one, that is left as it was.

    Attributes:
        pattern: name of the pattern that recognised it.
        reason: name of a `Reason`.
        op: the op that is the obstacle.
        source: file, line and code of that op.
        advice: what to change.
        text: the reason in one sentence.
        module: path of the region's module as in `LoopedRegion`; if there is no region, of the module of the op.
    """

    pattern: str
    reason: str
    op: str
    source: str
    advice: str
    text: str
    module: str

    def __str__(self) -> str:
        where = self.module or "the top"
        return (
            f"{self.pattern} at {where} left alone ({self.reason}): {self.text}\n    {self.source}\n    {self.advice}"
        )


@dataclass(frozen=True)
class EarlyCut:
    """A projection whose result the program cuts along the tokens; the compiled code cuts its operand.

    Attributes:
        module: path of the projection.
        source: file, line and code of the cut.
        bytes_before, bytes_after: bytes of what the projection makes.
    """

    module: str
    source: str
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        sizes = f"{readable(self.bytes_before)} -> {readable(self.bytes_after)} of logits"
        return f"cut before the head at {self.module or 'the top'}: {sizes}\n    {self.source}"


@dataclass(frozen=True)
class Dropped:
    """Logits that the compiled function does not return: in their place is an object that says why when it is used.

    Attributes:
        module: path of the projection that makes them.
        source: file, line and code of their op.
        bytes: bytes of the logits.
    """

    module: str
    source: str
    bytes: int

    def __str__(self) -> str:
        return f"nothing is returned for {readable(self.bytes)} at {self.module or 'the top'}\n    {self.source}"

    @property
    def instead(self) -> str:
        """What is said to who uses them."""
        where = f" of {self.module}" if self.module else ""
        return (
            f"mst_fx: the logits{where} ({readable(self.bytes)}, {self.source}) were never made: the option "
            "returned_logits='drop' is set. To use them in training, compile with returned_logits='detach' (without "
            "their gradient) or 'keep'"
        )


@dataclass(frozen=True)
class Report:
    """The decisions of one compile, in graph order.

    Attributes:
        regions: the regions that are looped.
        refusals: what is not looped, and why.
        cuts: projections that make less than the program says.
        dropped: logits that are not returned.
        graphs: number of graphs in the report; more than one after a graph break.
        peak, peak_whole: predicted peak bytes of a training step, with these loops and without any; the largest of
            several graphs.
        unlooped: the largest values that no loop covers, and why (see `Unlooped`).
        notes: what else the user should know.
    """

    regions: tuple[LoopedRegion, ...] = ()
    refusals: tuple[RefusedRegion, ...] = ()
    cuts: tuple[EarlyCut, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    graphs: int = 1
    peak: int = 0
    peak_whole: int = 0
    unlooped: tuple[Unlooped, ...] = ()
    notes: tuple[str, ...] = ()

    def __add__(self, other: Report) -> Report:
        peak, whole = max(self.peak, other.peak), max(self.peak_whole, other.peak_whole)
        report = replace(self.joined(other), graphs=self.graphs + other.graphs, peak=peak, peak_whole=whole)
        return replace(report, unlooped=tuple(largest(report.unlooped, peak)))

    def joined(self, other: Report) -> Report:
        """Return the report with the decisions about another part of the same graph added."""
        regions, refusals = self.regions + other.regions, self.refusals + other.refusals
        cuts, gone = self.cuts + other.cuts, self.dropped + other.dropped
        left, notes = joined(self.unlooped, other.unlooped), (*dict.fromkeys(self.notes + other.notes),)
        return Report(regions, refusals, cuts, gone, self.graphs, unlooped=left, notes=notes)

    def __str__(self) -> str:
        entries = (*self.regions, *self.cuts, *self.dropped, *self.refusals)
        if not self.graphs:
            return "\n".join(["mst_fx: no graph was captured, so there was nothing to decide", *self.notes])
        if not entries:
            head = f"mst_fx: nothing to loop in {self.graphs} graph(s): no pattern matched"
            return "\n".join([head, *text_of(self.unlooped), *self.notes])
        head = f"mst_fx: {len(self.regions)} looped, {len(self.refusals)} left alone, {self.graphs} graph(s)"
        if self.peak_whole:
            head += f"; peak of a step {readable(self.peak_whole)} -> {readable(self.peak)} (predicted)"
        return "\n".join([head, *map(str, entries), *text_of(self.unlooped), *self.notes])


def refused(pattern: str, refusal: Refusal, module: str | None = None) -> RefusedRegion:
    """Return the entry of a refused region.

    Args:
        pattern: name of the pattern, "all" where the refusal is about the whole graph.
        refusal: the reason, the node and the text.
        module: path of the region's module, None where no region was found.
    """
    node = refusal.node
    return RefusedRegion(
        pattern=pattern,
        reason=refusal.reason.name,
        op=op_name(node) if node is not None else "",
        source=source_line(node) if node is not None else "",
        advice=refusal.advice,
        text=refusal.text,
        module=module if module is not None else module_path(node) if node is not None else "",
    )


_MADE: deque[tuple[Report, Attempt | None]] = deque(maxlen=1000)


def record(report: Report) -> None:
    """Store the report of a compile for `reports`, in place of what it has stored before Dynamo began it anew."""
    now = attempt()
    while now is not None and _MADE and now.replaces(_MADE[-1][1]):
        _MADE.pop()
    _MADE.append((report, now))


def reports() -> list[Report]:
    """Return the reports of this process's compiles (the last thousand), oldest first, one for each graph."""
    return [report for report, _ in _MADE]
