"""Examples in processes of their own: one that crashes or hangs costs its process, and is a failure like any other."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from frugal import frugal, quiet

from fuzzing.check import FAILED, Outcome, check
from fuzzing.generate import generate
from fuzzing.shrink import shrunk

EXAMPLE_S, SHRINK_S = 180, 120  # what an example and the shrinking of one may take
LOST = "its process was lost:"
RENEWED = 200  # a process is ended after so many tasks, for its memory


@dataclass(frozen=True)
class Task:
    """One example, to check, or to shrink where `signature` tells how it failed."""

    seed: int
    small: bool = False
    signature: str = ""

    @property
    def seconds(self) -> float:
        return 2 * SHRINK_S + EXAMPLE_S if self.signature else EXAMPLE_S


@dataclass(frozen=True)
class Done:
    """What became of a task; `outcome` is None where nothing could be drawn."""

    task: Task
    outcome: Outcome | None
    text: str = ""
    tags: tuple[str, ...] = ()


def work(task: Task, inner: str) -> Done:
    program = generate(task.seed, task.small)
    if program is None:
        return Done(task, None)
    if task.signature:
        program = shrunk(program, task.signature, inner, SHRINK_S)
    tags = tuple(sorted({step.tag for step in program.steps}))
    return Done(task, check(program, inner), program.standalone(inner), tags)


def _serve(pipe: Connection, inner: str) -> None:
    with frugal(), quiet():
        while (task := pipe.recv()) is not None:
            try:
                pipe.send(work(task, inner))
            except Exception as error:  # the fuzzer's own fault: told like a failure
                pipe.send(Done(task, Outcome(FAILED, f"in the fuzzer: {error!r:.100}", repr(error))))


class Worker:
    """A process and the task that it has."""

    def __init__(self, inner: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, inner), daemon=True)
        self.process.start()
        other.close()
        self.task: Task | None = None
        self.since, self.count = 0.0, 0

    def give(self, task: Task) -> None:
        self.pipe.send(task)
        self.task, self.since, self.count = task, time.monotonic(), self.count + 1

    def late(self) -> bool:
        return self.task is not None and time.monotonic() - self.since > self.task.seconds

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Pool:
    """Runs tasks; more may be put in front while it runs."""

    def __init__(self, processes: int, inner: str) -> None:
        self.inner = inner
        self.workers: list[Worker | None] = [None] * processes
        self.urgent: list[Task] = []

    def run(self, tasks: Iterator[Task]) -> Iterator[Done]:
        """Results in the order in which they come."""
        try:
            while True:
                self._feed(tasks)
                busy = [w for w in self.workers if w is not None and w.task is not None]
                if not busy:
                    return
                yield from self._ready(busy)
        finally:
            for worker in self.workers:
                if worker is not None:
                    worker.stop()

    def _feed(self, tasks: Iterator[Task]) -> None:
        for position, worker in enumerate(self.workers):
            if worker is not None and worker.task is not None:
                continue
            task = self.urgent.pop(0) if self.urgent else next(tasks, None)
            if task is None:
                continue
            if worker is not None and worker.count >= RENEWED:
                worker.stop()
                worker = None
            worker = self.workers[position] = worker or Worker(self.inner)
            worker.give(task)

    def _ready(self, busy: list[Worker]) -> Iterator[Done]:
        ready: list[Any] = wait([w.pipe for w in busy], timeout=5)
        for worker in busy:
            assert worker.task is not None
            if worker.pipe in ready:
                try:
                    done = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    done = self._lost(worker, f"{LOST} exit status {worker.process.exitcode}")
            elif worker.late():
                done = self._lost(worker, f"{LOST} no end after {worker.task.seconds:.0f} s")
            else:
                continue
            worker.task = None
            yield done

    def _lost(self, worker: Worker, why: str) -> Done:
        assert worker.task is not None
        self.workers[self.workers.index(worker)] = None
        worker.stop()
        program = generate(worker.task.seed, worker.task.small)
        assert program is not None
        return Done(worker.task, Outcome(FAILED, why), program.standalone(self.inner))
