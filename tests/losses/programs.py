"""The sizes that all programs share, and how one joins a group.

Legend: B sequences, T tokens each, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

B, T, D, V = 2, 128, 8, 160
IGNORED = -100

Program = Callable[..., Any]


def add(group: dict[str, Program]) -> Callable[[Program], Program]:
    """Decorator: the program under its own name."""

    def register(program: Program) -> Program:
        assert program.__name__ not in group
        group[program.__name__] = program
        return program

    return register


def flat(x, w, y):
    return (x @ w.t()).view(-1, V), y.view(-1)
