"""The largest values of a graph that no loop covers. They are plain data, and `str()` gives their text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mst_fx.core.readable import readable
from mst_fx.core.refusal import Reason

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
        return self.told()

    def told(self, *, briefly: bool = False) -> str:
        """Return the value in words, without the advice if `briefly` is set."""
        size = readable(self.bytes) if self.count == 1 else f"{self.count} x {readable(self.bytes)}"
        what = f"{size}{' saved' if self.saved else ''}, {self.op} {list(self.shape)} {self.dtype}"
        lines = [f"{what} at {self.module or 'the top'}: {self.why}", self.source]
        return "\n    ".join(lines if briefly else [*lines, self.advice])


def kind_of(value: Unlooped) -> Unlooped:
    """Return what a value has in common with those that it is counted together with."""
    return replace(value, module=re.sub(r"\b\d+\b", "*", value.module), count=0)


def together(values: Iterable[Unlooped]) -> list[Unlooped]:
    """Return the values with those that are alike counted together, the largest total first."""
    groups: dict[Unlooped, list[Unlooped]] = {}
    for value in values:
        groups.setdefault(kind_of(value), []).append(value)
    found = []
    for key, group in groups.items():
        module = group[0].module if len(group) == 1 else key.module
        found.append(replace(group[0], module=module, count=sum(value.count for value in group)))
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
    entries = []
    for above, value in zip((None, *told), told, strict=False):
        repeated = above is not None and (above.why, above.advice) == (value.why, value.advice)
        entries.append(value.told(briefly=repeated))
    others = [value for value in values if value.reason == Reason.NO_GAIN.name]
    if others:
        size = readable(sum(value.total for value in others))
        entries.append(f"{size} in {len(others)} kind(s) of values that no loop makes smaller (report.unlooped)")
    return ["not looped, the largest first:", *entries] if entries else []
