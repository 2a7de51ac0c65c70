"""Entries that are alike but for the numbers in their modules' paths are told together: data stay one entry each."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

E = TypeVar("E", bound=Any)
"""A frozen dataclass with an attribute `module`, a path."""


def kind_of(entry: E) -> E:
    """Return what an entry has in common with those that it is told together with."""
    return replace(entry, module=re.sub(r"\b\d+\b", "*", entry.module))


def alike(entries: Iterable[E], kind: Callable[[E], Hashable] = kind_of) -> list[tuple[E, list[E]]]:
    """Return the entries in groups of one kind, in the order of the first of each.

    Args:
        entries: of a report.
        kind: the same for entries of one group.

    Returns:
        For each group its first entry, with * for the numbers in which the modules differ, and all of its entries.
    """
    groups: dict[Hashable, list[E]] = {}
    for entry in entries:
        groups.setdefault(kind(entry), []).append(entry)
    return [
        (replace(group[0], module=shared_path([entry.module for entry in group])), group) for group in groups.values()
    ]


def shared_path(modules: list[str]) -> str:
    """Return the path of several modules of one kind: "layers.0.a" and "layers.1.a" are "layers.*.a"."""
    names = zip(*(module.split(".") for module in modules), strict=True)
    return ".".join(each[0] if len(set(each)) == 1 else "*" for each in names)
