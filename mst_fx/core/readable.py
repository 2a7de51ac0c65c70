"""Bytes with a unit, for reports and messages."""

from __future__ import annotations


def readable(count: int) -> str:
    """Return a number of bytes with a unit: "1.5 MiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
