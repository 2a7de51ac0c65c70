"""A program as plain data, and its text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing.harness import COARSE, NARROW, RELATIVE

HARNESS = Path(__file__).with_name("harness.py")
HEAD = """
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
"""
CUT = "\n# --- the program ---\n"  # between the harness and what was drawn
NAME = re.compile(r"(?<![\w.'\"])([a-z]\d+)\b")  # every value and every input is a letter and a number


@dataclass(frozen=True)
class Input:
    """What a program is given.

    Attributes:
        name: a letter and a number.
        text: what makes it; sizes may be `T`, the length of the call.
        view: what the program gets of it, such as `x1.transpose(0, 1)`; empty: itself.
        kind: "stream", "weight", "plain" (labels, masks) or "number".
        mark: the dim that varies, for `mark_dynamic`.
    """

    name: str
    text: str
    view: str = ""
    kind: str = "plain"
    mark: int | None = None


@dataclass(frozen=True)
class Step:
    """One statement, perhaps of several lines.

    Attributes:
        text: the lines.
        tag: the kind of step, by which failures are grouped.
    """

    text: str
    tag: str

    @property
    def names(self) -> set[str]:
        return set(NAME.findall(self.text))

    @property
    def made(self) -> set[str]:
        """Names to which the statement gives a value."""
        found = re.findall(r"^\s*((?:[a-z]\d+, )*[a-z]\d+),? = ", self.text, re.M)
        return {name for names in found for name in names.split(", ")}


@dataclass(frozen=True)
class Program:
    """Statements over inputs, what they return, and how they are compiled and called.

    Attributes:
        lengths: of the stream, one a call.
        dynamic: True, False, None or "mark".
        module: weights are parameters of a module.
        options: of mst_fx.
        backward, cotangent: as `harness.back` and `harness.cotangent` take them.
    """

    seed: int
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    lengths: tuple[int, ...]
    dynamic: bool | str | None = False
    module: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    backward: str = "all"
    cotangent: str = "random"

    @property
    def used(self) -> tuple[Input, ...]:
        names = set(self.outputs).union(*(step.names for step in self.steps))
        return tuple(x for x in self.inputs if x.name in names)

    @property
    def relative(self) -> float:
        """How far a result may be from eager's."""
        text = "\n".join(step.text for step in self.steps)
        if "bfloat16" in text:
            return COARSE
        return NARROW if re.search(r"float\(\)|float32", text) else RELATIVE

    def compiling(self, inner: str) -> dict[str, Any]:
        dynamic = None if self.dynamic == "mark" else self.dynamic
        options = {"min_bytes": 0, "strict": True, "inner": inner, **self.options}
        if inner != "eager":  # `verify` is about the loops, whatever compiles them
            options.pop("verify", None)
        compiling = {"backend": "mst_fx", "dynamic": dynamic, "options": options}
        if any(".data" in step.text for step in self.steps):  # a write through it must stand in the graph of its region
            compiling["fullgraph"] = True
        return compiling

    def text(self) -> str:
        """The function, or module, and its inputs."""
        held = [x for x in self.used if self.module and x.kind == "weight"]
        given = [x for x in self.used if x not in held]
        body = [f"{x.name} = self.{x.name}" for x in held]
        body += [line for step in self.steps for line in step.text.splitlines()]
        body.append(f"return {', '.join(self.outputs)}{',' * (len(self.outputs) == 1)}")
        names = ", ".join(x.name for x in given)
        if held:
            top = ["class program(nn.Module):", "    def __init__(self):", "        super().__init__()"]
            top += [f"        self.{x.name} = {x.text}" for x in held]
            top += ["", f"    def forward(self, {names}):", *(f"        {line}" for line in body)]
        else:
            top = [f"def program({names}):", *(f"    {line}" for line in body)]
        return HEAD + "\n\n" + "\n".join([*top, "", "", *self._inputs(given)]) + "\n"

    def _inputs(self, given: list[Input]) -> list[str]:
        lines = ["def inputs(call):", f"    T = {self.lengths}[call]"]
        lines += [f"    {x.name} = {x.text}" for x in given]
        leaves = ", ".join(x.name for x in given if x.kind in ("stream", "weight"))
        views = [f"    {x.name}_ = {x.view or x.name}" for x in given if x.kind == "stream"]
        if self.dynamic == "mark":  # torch refuses to mark a size of 1, and one that equals a size not marked
            marked = [x for x in given if x.mark is not None]
            plain = any(re.search(r"\bT\b", x.text) for x in given if x not in marked)
            how = "maybe_mark_dynamic" if plain or min(self.lengths) < 2 else "mark_dynamic"
            views += [f"    torch._dynamo.{how}({x.name}_, {x.mark})" for x in marked]
        args = ", ".join(f"{x.name}_" if x.kind == "stream" else x.name for x in given)
        return [*lines, *views, f"    return [{leaves}], [{args}]"]

    def standalone(self, inner: str) -> str:
        """A file that shows the difference when it is run."""
        call = f"{self.compiling(inner)}, {self.backward!r}, {self.cotangent!r}, {self.relative}"
        return (
            f"{HARNESS.read_text()}{CUT}{self.text()}\n\n"
            f"print(compare(program, inputs, {len(self.lengths)}, {call}), 'looped')\n"
            "print(*mst_fx.reports(), sep='\\n')\n"
        )
