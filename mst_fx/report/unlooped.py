"""The largest values of a graph that no loop covers. They are plain data, and `str()` gives their text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mst_fx.core.readable import readable
from mst_fx.core.refusal import Reason
from mst_fx.report.alike import alike
from mst_fx.report.alike import kind_of as kind_of_entry
from mst_fx.report.lines import at, entry, several, times

MOST = 10
"""Number of entries in a report: it has to stay short."""
SHARE_OF_PEAK = 0.02
"""The least share of a step's peak that is told: the share at which loops that recompute nothing are worth it."""


@dataclass(frozen=True)
class Unlooped:
    """A large value that no loop covers, or several that are alike.

    Attributes:
        op: the op that makes it.
        module: path of the module that the op belongs to; with * for numbers where values of several are alike.
        source: file, line and code of the op.
        shape, dtype: of the value.
        bytes: of one value.
        count: number of values.
        saved: whether it is saved for backward outside of any checkpointed block, so that all of them exist at once.
        reason: name of a `Reason`.
        why: the reason in one sentence.
        advice: what would help.
        enters: whether another graph makes it, and this one reads it.
    """

    op: str
    module: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    count: int
    saved: bool
    reason: str
    why: str
    advice: str
    enters: bool = False

    @property
    def total(self) -> int:
        """Bytes that exist at once."""
        return self.bytes * self.count if self.saved else self.bytes

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, *, briefly: bool = False) -> list[str]:
        """Return the text of the value, without the advice if `briefly` is set."""
        size = f"{times(self.count)}{readable(self.bytes)}{' saved' if self.saved else ''}"
        head = f"{size}, {self.op} {list(self.shape)} {self.dtype} at {at(self.module)}: {self.why}"
        return entry(head, "" if briefly else self.advice, source=self.source)


def kind_of(value: Unlooped) -> Unlooped:
    """Return what a value has in common with those that it is counted together with."""
    return replace(kind_of_entry(value), count=0)


def together(values: Iterable[Unlooped]) -> list[Unlooped]:
    """Return the values with those that are alike counted together, the largest total first."""
    found = [replace(value, count=sum(each.count for each in group)) for value, group in alike(values, kind_of)]
    return sorted(found, key=lambda value: -value.total)


def largest(values: Iterable[Unlooped], peak: int) -> list[Unlooped]:
    """Return what to tell of, alike values together: at most MOST, those of a share of the peak, the largest first."""
    return [value for value in together(values) if value.total >= SHARE_OF_PEAK * peak][:MOST]


def joined(one: tuple[Unlooped, ...], other: tuple[Unlooped, ...]) -> tuple[Unlooped, ...]:
    """Return the largest values of two graphs; a value that one makes and the other reads is that of the first."""
    made = {(value.shape, value.dtype) for value in (*one, *other) if not value.enters}
    left = [value for value in (*one, *other) if not (value.enters and (value.shape, value.dtype) in made)]
    return tuple(together(left)[:MOST])


def text_of(values: tuple[Unlooped, ...]) -> list[str]:
    """Return the values as a part of the text of a report.

    An advice that stands just above is not told again. Those that no loop would make smaller are told in one line: the
    data tell each of them.
    """
    told = [value for value in values if value.reason != Reason.NO_GAIN.name]
    entries: list[str] = []
    for above, value in zip((None, *told), told, strict=False):
        repeated = above is not None and (above.why, above.advice) == (value.why, value.advice)
        entries += value.lines(briefly=repeated)
    others = [value for value in values if value.reason == Reason.NO_GAIN.name]
    if others:
        size = readable(sum(value.total for value in others))
        entries.append(
            f"{size} in {several(len(others), 'kind')} of values that no loop makes smaller (report.unlooped)"
        )
    return ["not looped, the largest first:", *entries] if told else [f"not looped: {line}" for line in entries]
