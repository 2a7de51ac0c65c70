"""What `tradeoff.py` measures: its rows, and a file of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turns import Timed, load

METHODS = ("plain", "plain, any length", "checkpointing", "mst_fx", "mst_fx, any length", "both")
UNLOOPED = {"plain": "mst_fx", "checkpointing": "both"}
"""The method without loops, and the same with them."""


@dataclass(frozen=True)
class Row(Timed):
    """One method at one length.

    Attributes:
        chunk: length of the mini-sequences that was asked for; None where there is none, or the plan chooses.
        chosen: number of mini-sequences of each pattern, and what was left alone.
        predicted_gib: peak that mst_fx predicts for the plan, above the weights.
        unlooped_gib: that it predicts for the same model without loops.
        error: what there is in place of numbers.
    """

    tokens: int
    method: str
    chunk: int | None
    times_ms: tuple[float, ...] = ()
    peak_gib: float = 0.0
    chosen: str = ""
    predicted_gib: float = 0.0
    unlooped_gib: float = 0.0
    error: str = ""


def named(row: Row) -> str:
    return row.method if row.chunk is None else f"{row.method}, chunks of {row.chunk:,}"


def lengths_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row.tokens for row in rows})


def predicted(row: Row, rows: Sequence[Row]) -> float:
    """GiB above the weights that were predicted for a row; those without loops are told by their planned kin."""
    kin = UNLOOPED.get(row.method)
    if kin is None:
        return row.predicted_gib
    return next(x.unlooped_gib for x in rows if (x.tokens, x.method, x.chunk) == (row.tokens, kin, None))


def load_newest(paths: Sequence[str]) -> tuple[str, list[Row]]:
    """What the files say of their runs, and their rows; of a length that several hold, those of the last one.

    Times of different runs do not mix: only what took turns can be compared.
    """
    about, runs = load(paths, Row)
    newest: dict[int, list[Row]] = {}
    for rows in runs:
        newest |= {tokens: [row for row in rows if row.tokens == tokens] for tokens in lengths_of(rows)}
    return about, [row for rows in newest.values() for row in rows]
