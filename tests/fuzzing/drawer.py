"""Draws statements one by one, running each in eager mode at two lengths: what raises is not taken.

A dim that differs between the two runs is one of tokens. Legend: T tokens, D features of the stream, F wide features.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fuzzing import harness
from fuzzing.program import Input, Step

PROBES = (7, 9)
LENGTHS = (1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9, 10, 11, 12, 13, 16, 17)
FEW_LENGTHS = (6, 6, 6, 6, 6, 7, 8, 8, 9, 1, 12)  # few sizes: torch remembers what it made of each
A = TypeVar("A")


class Drawer:
    """The program so far.

    Attributes:
        random: where every choice comes from.
        runs: the values of every name, one dict a probe length.
        widths: sizes of the features: of the stream, and of wide values.
    """

    def __init__(self, seed: int, small: bool = False) -> None:
        self.random = random.Random(seed)
        self.inputs: list[Input] = []
        self.steps: list[Step] = []
        self.kept: list[str] = []  # what the program may return
        self.weights: dict[tuple[int, ...], list[str]] = {}
        self.count = 0
        self.small = small
        calls = self.choice((1,) * 15 + (2,) if small else (1, 1, 2, 2, 2, 3))
        self.lengths = tuple(self.choice(FEW_LENGTHS if small else LENGTHS) for _ in range(calls))
        one = (False,) * 20 + (True, True, "mark") if small else (False, False, None, True, "mark")
        self.dynamic: bool | str | None = self.choice((True, None, None, "mark") if calls > 1 else one)
        helpers = {function.__name__: function for function in harness.OWN} | {"D": torch.float64}
        makers = {"normal": harness.normal, "weight": harness.weight, "indices": harness.indices}
        common = {"torch": torch, "F": nn.functional, "nn": nn, "checkpoint": checkpoint, **helpers, **makers}
        self.runs = tuple({**common, "T": probe} for probe in PROBES)
        self.D, self.F = self.choice((3, 4) if small else (2, 3, 4, 6)), self.choice((8, 12) if small else (8, 12, 16))

    def choice(self, options: Sequence[A]) -> A:
        return options[self.random.randrange(len(options))]

    def weighted(self, options: Iterable[str], often: dict[str, int]) -> str:
        options = list(options)
        return self.random.choices(options, [often.get(option, 1) for option in options])[0]

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def name(self, letter: str = "v") -> str:
        self.count += 1
        return f"{letter}{self.count}"

    @property
    def varies(self) -> bool:
        """Whether torch may take a number or a size for one that varies."""
        return self.dynamic is True or (self.dynamic is not False and len(self.lengths) > 1)

    # --- what a program is given

    def given(self, letter: str, text: str, view: str = "", kind: str = "plain", mark: int | None = None) -> str:
        name = self.name(letter)
        view = view.replace("@", name)
        for seed, run in enumerate(self.runs):
            torch.manual_seed(seed)
            made = eval(text, run)
            run[name] = eval(view, {**run, name: made}) if view else made
        self.inputs.append(Input(name, text, view, kind, mark))
        return name

    def weight(self, *shape: int) -> str:
        """A weight of this shape: a parameter or not, shared, frozen, computed, narrow, transposed or cut."""
        known = self.weights.setdefault(shape, [])
        if known and self.chance(0.15):
            return self.choice(known)
        maker = self.choice(("weight", "weight", "normal"))
        if self.dynamic is True and self.chance(0.9):
            maker = "weight"  # whose sizes are fixed
        grad = ", grad=False" if self.chance(0.12) else ""
        scale = f", scale={0.6 if len(shape) < 2 else round(1.2 / shape[-2] ** 0.5, 2)}"

        def plain(*sizes: int, extra: str = "") -> str:
            return self.given("w", f"{maker}({', '.join(map(str, sizes))}{grad}{extra}{scale})", kind="weight")

        how = self.random.random()
        if how > 0.3 or len(shape) != 2:
            name = plain(*shape)
        elif how < 0.06:
            name = f"{plain(*shape, extra=', dtype=torch.float32')}.double()"
        elif how < 0.12:
            name = f"{plain(*shape[::-1])}.t()"
        elif how < 0.16:
            name = f"{plain(shape[0], shape[1] + 3)}[:, 3:]"
        elif how < 0.22:
            name = f"F.normalize({plain(*shape)}, dim={self.choice((0, 1))})"
        elif how < 0.27:
            rows = ("{}", "F.normalize({}, dim=1)")[how > 0.24]
            name = f"({rows.format(plain(*shape))} * {plain(shape[0], 1)})"
        else:
            name = f"({plain(*shape)} + {plain(shape[0], 2)} @ {plain(2, shape[1])})"
        known.append(name)
        return name

    def plain_weight(self, *shape: int) -> str:
        """A weight and nothing else."""
        maker = self.choice(("weight", "normal"))
        sizes, scale = ", ".join(map(str, shape)), f"{1.2 / shape[-2] ** 0.5:.2f}"
        return self.given("w", f"{maker}({sizes}, scale={scale})", kind="weight")

    def number(self, low: int, high: int, whole: bool = True) -> str:
        """A number that differs from call to call: an argument, or computed from a size."""
        values = tuple(self.random.randint(low, high) for _ in self.lengths)
        if not whole:
            values = tuple(value + self.choice((0.25, 0.5)) for value in values)
        name = self.name("n")
        for run in self.runs:
            run[name] = values[0]
        self.inputs.append(Input(name, f"{values}[call]", kind="number"))
        return name

    # --- values and statements

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.runs[0][name].shape)

    def token_dims(self, name: str) -> list[int]:
        one, two = (run[name].shape for run in self.runs)
        return [dim for dim, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]

    def size(self, name: str, dim: int) -> str:
        """The size as a number, or as an expression if it varies."""
        one, two = (run[name].shape[dim] for run in self.runs)
        return str(one) if one == two else f"{name}.shape[{dim}]"

    def sizes(self, name: str) -> list[str]:
        """The sizes of a value as text, of the length T."""
        texts = []
        for one, two in zip(*(run[name].shape for run in self.runs), strict=True):
            slope = (two - one) // (PROBES[1] - PROBES[0])
            rest = one - slope * PROBES[0]
            texts.append(f"{slope} * T + {rest}".removeprefix("1 * ").removesuffix(" + 0") if slope else str(one))
        return texts

    def like(self, name: str) -> list[str]:
        """Values of the same shape that can be differentiated."""
        shapes = tuple(run[name].shape for run in self.runs)
        return [other for other in self.tensors() if tuple(run[other].shape for run in self.runs) == shapes]

    def tensors(self) -> list[str]:
        made = [name for step in self.steps for name in sorted(step.made)]
        return [n for n in dict.fromkeys(made) if isinstance(self.runs[0].get(n), torch.Tensor)]

    def add(self, text: str, tag: str) -> bool:
        """Take a statement if it runs at both lengths."""
        saved = [dict(run) for run in self.runs]
        try:
            for run in self.runs:
                exec(text, run)
        except Exception:
            for run, before in zip(self.runs, saved, strict=True):
                run.clear()
                run.update(before)
            return False
        self.steps.append(Step(text, tag))
        return True

    def let(self, expression: str, tag: str) -> str | None:
        """A statement that names the value of an expression."""
        name = self.name()
        return name if self.add(f"{name} = {expression}", tag) else None

    def any_of(self, makers: Sequence[Callable[[Drawer, str], str | None]], value: str, tries: int = 4) -> str:
        """The result of one of these steps on a value; the value itself if none can be taken."""
        for _ in range(tries):
            made = self.choice(makers)(self, value)
            if made is not None:
                return made
        return value
