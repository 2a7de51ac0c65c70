"""Makes a program that fails smaller for as long as it fails in the same way."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fuzzing.check import FAILED, check
from fuzzing.generate import simpler
from fuzzing.program import NAME, Input, Program, Step

PLAIN: dict[str, tuple[Any, ...]] = {
    "dynamic": (False, True),
    "module": (False,),
    "backward": ("all",),
    "cotangent": ("random",),
    "options": ({"num_chunks": 3}, {"num_chunks": 2}),
}


def shrunk(program: Program, signature: str, inner: str, seconds: float) -> Program:
    """The smallest that was found in this time."""
    end = time.monotonic() + seconds
    tried: set[str] = set()
    changed = True
    while changed and time.monotonic() < end:
        changed = False
        for candidate in candidates(program):
            if time.monotonic() > end:
                break
            key = candidate.standalone(inner)
            if key in tried:
                continue
            tried.add(key)
            outcome = check(candidate, inner)
            if outcome.kind == FAILED and outcome.signature == signature:
                program, changed = candidate, True
                break
    return program


def candidates(program: Program) -> Iterator[Program]:
    """Programs with less in them that eager mode runs, the boldest first."""
    for changes in _changes(program):
        candidate = simpler(program, **changes)
        if candidate is not None and candidate != program:
            yield candidate


def _changes(program: Program) -> Iterator[dict[str, Any]]:
    if len(program.outputs) > 1:
        yield from (live(program, (output,)) for output in program.outputs)
    yield from _fewer_calls(program)
    for position in reversed(range(len(program.steps))):
        yield without(program, position)
    if len(program.outputs) > 2:
        yield from (live(program, tuple(x for x in program.outputs if x != output)) for output in program.outputs)
    for position in reversed(range(len(program.steps))):
        yield from bypassed(program, position)
    yield from _plainer_settings(program)
    yield from _plainer_inputs(program)


def _plainer_settings(program: Program) -> Iterator[dict[str, Any]]:
    for key, plain in PLAIN.items():
        if getattr(program, key) not in plain:
            yield from ({key: value} for value in plain)


def _fewer_calls(program: Program) -> Iterator[dict[str, Any]]:
    count = len(program.lengths)
    kept = [(call,) for call in range(count)] * (count > 1) + [(0, 1)] * (count > 2)
    for calls in kept:
        inputs = tuple(_of_calls(x, calls) for x in program.inputs)
        yield {"lengths": tuple(program.lengths[call] for call in calls), "inputs": inputs}


def _of_calls(x: Input, calls: tuple[int, ...]) -> Input:
    if x.kind != "number":
        return x
    values = eval(x.text.removesuffix("[call]"))
    return replace(x, text=f"{tuple(values[call] for call in calls)}[call]")


def live(program: Program, outputs: tuple[str, ...]) -> dict[str, Any]:
    """These outputs, and the statements that have to do with them."""
    names, steps = set(outputs), []
    for step in reversed(program.steps):
        if step.made & names or (not step.made and step.names & names):
            steps.append(step)
            names |= step.names
    return {"outputs": outputs, "steps": tuple(reversed(steps))}


def without(program: Program, position: int) -> dict[str, Any]:
    """A statement goes, with all that reads what it made."""
    gone, steps = set(program.steps[position].made), list(program.steps[:position])
    for step in program.steps[position + 1 :]:
        if step.names & gone:
            gone |= step.made
        else:
            steps.append(step)
    outputs = tuple(x for x in program.outputs if x not in gone)
    return {"steps": tuple(steps), "outputs": outputs or tuple(sorted(steps[-1].made if steps else ()))[:1]}


def bypassed(program: Program, position: int) -> Iterator[dict[str, Any]]:
    """A statement goes, and what it made is one of its operands; or it becomes a plain activation of it."""
    step = program.steps[position]
    if len(step.made) == 0:
        return
    for operand in sorted(step.names - step.made):
        if operand[0] not in "vx":
            continue
        steps = [*program.steps[:position], *program.steps[position + 1 :]]
        renamed = tuple(Step(_renamed(s.text, step.made, operand), s.tag) for s in steps)
        yield {
            "steps": renamed,
            "outputs": tuple(dict.fromkeys(operand if x in step.made else x for x in program.outputs)),
        }


def _renamed(text: str, names: set[str], operand: str) -> str:
    return NAME.sub(lambda found: operand if found[1] in names else found[1], text)


def _plainer_inputs(program: Program) -> Iterator[dict[str, Any]]:
    for position, x in enumerate(program.inputs):
        rest = (program.inputs[:position], program.inputs[position + 1 :])
        for text, view in _plainer(x):
            if (text, view) != (x.text, x.view):
                yield {"inputs": (*rest[0], replace(x, text=text, view=view), *rest[1])}


def _plainer(x: Input) -> Iterator[tuple[str, str]]:
    yield x.text, ""
    yield re.sub(r", scale=[\d.]+", "", x.text), x.view
    yield re.sub(r"^weight", "normal", x.text), x.view
    yield x.text.replace(", grad=False", ""), x.view
