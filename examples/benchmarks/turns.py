"""Several methods, one piece of work: all are warmed up, then take turns, so that clocks are fair to each of them.

A GPU that draws all the power it may have changes its clocks, by up to a fifth, for some hundred milliseconds after the
load has changed. So a turn lasts about a second, and its first part is not timed.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

Step = Callable[[], Any]
R = TypeVar("R")  # a row: what is known of one method, with `times_ms` and `error`
K = TypeVar("K")
TURN_S = {"cuda": 0.8, "cpu": 0.05}
"""Seconds of a turn that are timed, at least one step; half as many run before them."""


class Timed:
    """What rows have in common."""

    times_ms: tuple[float, ...]

    @property
    def ms(self) -> float:
        """Of a typical step."""
        return statistics.median(self.times_ms)


@dataclass(frozen=True)
class Row(Timed):
    """One method on one piece of work.

    Attributes:
        work: name of the shapes.
        tokens: length of the sequence.
        times_ms: of its turns.
        peak_gib: above the inputs, gradients included; 0 on a CPU.
        gradients_gib: what the gradients alone take.
        error: what there is in place of numbers.
    """

    work: str
    tokens: int
    method: str
    times_ms: tuple[float, ...] = ()
    peak_gib: float = 0.0
    gradients_gib: float = 0.0
    error: str = ""


def save(path: str, about: str, rows: Sequence[Any]) -> None:
    """Write a run: what is to be said of it, and its rows."""
    whole = {"about": about, "rows": [asdict(row) for row in rows]}
    Path(path).write_text(json.dumps(whole, indent=1), encoding="utf-8")


def load(paths: Sequence[str], kind: type[R]) -> tuple[str, list[list[R]]]:
    """What several files say of their runs, and the rows of each."""
    files = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    rows = [[kind(**{**entry, "times_ms": tuple(entry["times_ms"])}) for entry in file["rows"]] for file in files]
    return "\n".join(dict.fromkeys(file["about"] for file in files)), rows


def tables(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """A table for each piece of work and length; ratios are to the first method that has numbers, as listed.

    Args:
        rows: of all methods.
        titles: by work; {tokens} is filled in.
    """
    lines: list[str] = []
    for name, tokens in dict.fromkeys((row.work, row.tokens) for row in rows):
        mine = [row for row in rows if (row.work, row.tokens) == (name, tokens)]
        done = [row for row in mine if not row.error]
        title = titles[name].format(tokens=f"{tokens:,}")
        gradients = f"{done[0].gradients_gib:.2f}" if done else "-"
        lines += ["", f"| {title} | ms | ratio | peak GiB (gradients {gradients}) |", "|---|---|---|---|"]
        for row in mine:
            ratio = "-" if row.error else f"{row.ms / done[0].ms:.3f}"
            numbers = f"{row.error} | - | -" if row.error else f"{row.ms:.1f} | {ratio} | {row.peak_gib:.2f}"
            lines.append(f"| {row.method} | {numbers} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Inputs:
    """Tensors of one length.

    Attributes:
        given: the function's arguments.
        leaves: those that get gradients.
        upstream: gradient of the result; None for a loss.
    """

    given: Sequence[torch.Tensor]
    leaves: Sequence[torch.Tensor]
    upstream: torch.Tensor | None = None


def measure_methods(
    name: str, tokens: int, methods: Mapping[str, Callable[..., Any]], inputs: Inputs, rounds: int
) -> list[Row]:
    """All methods on one piece of work, at one length; what a method holds is free again behind it."""
    steps = {method: make_step(fn, inputs.given, inputs.upstream) for method, fn in methods.items()}
    rows = measure([Row(name, tokens, method) for method in methods], steps, rounds, inputs.leaves)
    for leaf in inputs.leaves:
        leaf.grad = None
    del steps
    gc.collect()
    return rows


def make_step(fn: Callable[..., Any], inputs: Sequence[torch.Tensor], upstream: torch.Tensor | None) -> Step:
    """Forward and backward."""
    leaves = [x for x in inputs if x.requires_grad]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        fn(*inputs).backward(upstream)

    return step


def measure(rows: Sequence[Row], steps: dict[str, Step], rounds: int, leaves: Sequence[torch.Tensor]) -> list[Row]:
    """Warm every method up and read its peak alone, then time all of them in turn.

    Args:
        rows: without numbers, one for each method.
        steps: by method.
        rounds: turns of each method.
        leaves: what gets gradients.
    """
    found = {row.method: attempt(row, partial(warm_up, step=steps[row.method], leaves=leaves)) for row in rows}
    turns = {method: partial(add_time, step=step, device=leaves[0].device) for method, step in steps.items()}
    return list(take_turns(found, turns, rounds).values())


def take_turns(rows: dict[K, R], turns: dict[K, Callable[[R], R]], rounds: int) -> dict[K, R]:
    """The rows after `rounds` turns of each, in random order; what fails drops out."""
    rows, order = dict(rows), list(rows)
    for _ in range(rounds):
        random.shuffle(order)
        for key in order:
            rows[key] = rows[key] if rows[key].error else attempt(rows[key], turns[key])
    return rows


def attempt(row: R, act: Callable[[R], R]) -> R:
    """The row that `act` makes of this one, or one with the error: a method that fails is a result."""
    try:
        return act(row)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:100]}".splitlines()[0]
        text = "out of memory" if "out of memory" in str(error) else text
    gc.collect()  # not above: until the handler ends, the traceback holds what the step had made
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return replace(row, times_ms=(), error=text)


def warm_up(row: Row, step: Step, leaves: Sequence[torch.Tensor]) -> Row:
    for _ in range(3):
        step()
    return replace(row, peak_gib=peak_of(step, leaves), gradients_gib=sum(leaf.nbytes for leaf in leaves) / 2**30)


def add_time(row: R, step: Step, device: torch.device) -> R:
    """One turn."""
    once_ms = time_of(step, device, 1)
    timed = max(1, round(TURN_S[device.type] * 1e3 / once_ms))
    for _ in range(timed // 2):
        step()
    return replace(row, times_ms=(*row.times_ms, time_of(step, device, timed)))


def peak_of(step: Step, leaves: Sequence[torch.Tensor]) -> float:
    """GiB above the inputs in one step; 0 on a CPU."""
    if not leaves[0].is_cuda:
        return 0.0
    for leaf in leaves:
        leaf.grad = None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def time_of(step: Step, device: torch.device, count: int) -> float:
    """Milliseconds of one step, the mean of `count` in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - start) * 1e3 / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count
