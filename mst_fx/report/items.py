"""What a report lists: regions looped and refused, early cuts, logits dropped. They are plain data."""

from __future__ import annotations

from dataclasses import dataclass

from mst_fx.core.module_paths import module_path
from mst_fx.core.provenance import op_name, source_line
from mst_fx.core.readable import readable
from mst_fx.core.refusal import Refusal
from mst_fx.report.lines import at, entry, several, times


class Entry:
    """An entry of a report; its text is its lines."""

    def lines(self, count: int = 1) -> list[str]:
        """Return the text of `count` entries that are alike."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class LoopedRegion(Entry):
    """A region that runs as a loop.

    Attributes:
        pattern: name of the pattern that recognised it.
        module: path of the innermost module that holds its projections: an MLP, or the projection of a head.
        source: file, line and code of its last op.
        axis: the split dim of the stream, and its length in positions; or the heads, and how many there are.
        chunks: number of mini-sequences.
        bytes_before, bytes_after: bytes of the region's temporaries, unlooped and with one chunk alive.
        backward: "recompute", "in_forward" or "none".
        added_ms: predicted milliseconds that the loop adds to a training step.
        returned_bytes: bytes of logits that the compiled function returns, so that they exist as a whole.
        returned_gradient_bytes: bytes of their gradient, with which backward starts even if nobody used them.
        verified: with the option `verify`, True for a loop that ran and is right, False for one that could not run.
        verification: at which sizes it ran, or why it could not.
        note: what else there is to say, as of one chunk that saves nothing.
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
    note: str = ""

    def lines(self, count: int = 1) -> list[str]:
        """Return the text of `count` regions that are alike."""
        head = f"{times(count)}{self.pattern} at {at(self.module)}: {several(self.chunks, 'chunk')} of {self.axis}"
        temporaries = f"{readable(self.bytes_before)} -> {readable(self.bytes_after)} of temporaries"
        time = f"{self.added_ms:+.1f} ms a step{' each' if count > 1 else ''} (predicted)"
        numbers = f"{temporaries}, backward {self.backward.replace('_', ' ')}, {time}"
        more = (self._returned(), self._gradient(), self._verification(), self.note)
        return entry(head, numbers, *more, source=self.source)

    def _returned(self) -> str:
        size = readable(self.returned_bytes)
        told = f"Returned logits have to exist: {size}; returned_logits='drop' does without them in training."
        return told if self.returned_bytes else ""

    def _gradient(self) -> str:
        size = readable(self.returned_gradient_bytes)
        told = f"Backward starts with their gradient, {size}; returned_logits='detach' does without it."
        return told if self.returned_gradient_bytes else ""

    def _verification(self) -> str:
        if self.verified is None:
            return ""
        return f"{'Verified at' if self.verified else 'Could not be verified:'} {self.verification}."


@dataclass(frozen=True)
class RefusedRegion(Entry):
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

    def lines(self, count: int = 1, *, briefly: bool = False) -> list[str]:
        """Return the text of `count` refusals that are alike, without the advice if `briefly` is set."""
        head = f"{times(count)}{self.pattern} at {at(self.module)} left alone ({self.reason}): {self.text}"
        return entry(head, "" if briefly else self.advice, source=self.source)


@dataclass(frozen=True)
class EarlyCut(Entry):
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

    def lines(self, count: int = 1) -> list[str]:
        """Return the text of `count` cuts that are alike."""
        sizes = f"{readable(self.bytes_before)} -> {readable(self.bytes_after)} of logits"
        return entry(f"{times(count)}cut before the head at {at(self.module)}: {sizes}", source=self.source)


@dataclass(frozen=True)
class Dropped(Entry):
    """Logits that the compiled function does not return: in their place is an object that says why when it is used.

    Attributes:
        module: path of the projection that makes them.
        source: file, line and code of their op.
        bytes: bytes of the logits.
    """

    module: str
    source: str
    bytes: int

    def lines(self, count: int = 1) -> list[str]:
        """Return the text of `count` values that are alike."""
        return entry(
            f"nothing is returned for {times(count)}{readable(self.bytes)} at {at(self.module)}", source=self.source
        )

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
class Offloaded(Entry):
    """A value that a checkpointed block keeps for backward in the host's memory.

    Attributes:
        module: path of the block.
        source: file, line and code of what makes the value, or of the block where its caller does.
        bytes: bytes of the value.
    """

    module: str
    source: str
    bytes: int

    def lines(self, count: int = 1) -> list[str]:
        """Return the text of `count` values that are alike."""
        told = f"on the host until backward: {times(count)}{readable(self.bytes)} that {at(self.module)} reads"
        return entry(told, source=self.source)


def refused(pattern: str, refusal: Refusal, module: str | None = None) -> RefusedRegion:
    """Return the entry of a refused region.

    Args:
        pattern: name of the pattern, "all" where the refusal is about the whole graph, "projection" where no pattern
            can tell what it belongs to.
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
