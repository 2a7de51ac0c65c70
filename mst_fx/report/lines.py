"""Lines of text that fit a terminal."""

from __future__ import annotations

import re
from pathlib import PurePath
from textwrap import wrap

WIDTH = 100
"""Columns. A longer word is not broken."""
INDENT = "    "
TIED = "\N{NO-BREAK SPACE}"


def prose(text: str, indent: str = "") -> list[str]:
    """Return a sentence in lines of at most WIDTH columns; those after the first are indented further."""
    joined = re.sub(r"(?<=\d) (?=(?:B|[KMG]iB|ms)\b)", TIED, text)
    lines = wrap(
        joined,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(TIED, " ") for line in lines]


def entry(head: str, *details: str, source: str = "") -> list[str]:
    """Return the lines of one entry: its head, the source line, and details in sentences; those empty are left out."""
    lines = prose(head) + ([INDENT + source_clipped(source, WIDTH - len(INDENT))] if source else [])
    return lines + [line for detail in details if detail for line in prose(detail, INDENT)]


def source_clipped(source: str, width: int) -> str:
    """Return `file:line: code` in at most `width` columns: first the folders are left out, then the end of the code."""
    found = re.fullmatch(r"(.+?)(:\d+: .*)", source, re.DOTALL)
    if len(source) > width and found is not None:
        parts = PurePath(found[1]).parts
        source = (str(PurePath("...", *parts[-2:])) if len(parts) > 3 else found[1]) + found[2]
    return clipped(source, width)


def clipped(text: str, width: int) -> str:
    """Return a text in at most `width` columns."""
    return text if len(text) <= width else text[: width - 3] + "..."


def at(module: str) -> str:
    """Return where a module is, in words."""
    return module or "the top"


def several(number: int, thing: str) -> str:
    """Return a number of things: "1 graph", "2 graphs"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def times(number: int) -> str:
    """Return what stands in front of a thing that is there so often: "32 x ", and "" for one."""
    return f"{number} x " if number > 1 else ""


def short(op: str) -> str:
    """Return the name of an op without the module of torch or of Python that it is in, nor a default overload."""
    return re.sub(r"^(torch\.nn\.functional|torch|operator|aten)\.(\w+?)(\.default)?$", r"\2", op)
