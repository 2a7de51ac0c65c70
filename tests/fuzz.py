"""Random programs compiled with mst_fx beside eager: same values, same gradients, no crash, no internal error.

    python tests/fuzz.py --examples 10000 --seed 0       in as many processes as there are cores
    python tests/fuzz.py --example 17                    one, with its text and its report

The exit status is 0 if all hold, 1 if any failed. A failure is shrunk, and printed as a file that shows it by itself.
Programs that fail in torch without mst_fx are counted and left out, and so are those that rounding decides.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fuzzing.check import FAILED, OK, TORCH, UNSTABLE, check
from fuzzing.generate import generate
from fuzzing.parallel import LOST, Done, Pool, Task
from fuzzing.program import CUT


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first example; each has the next one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no example after this time")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--inner", choices=["eager", "aot_eager", "inductor"], default="aot_eager")
    parser.add_argument("--small", action="store_true", help="one block a program, as in the suite")
    parser.add_argument("--shrink", type=int, default=1, help="failures of a kind to shrink")
    parser.add_argument("--out", type=Path, help="a folder for the programs that failed")
    parser.add_argument("--example", type=int, help="run the example of this seed alone")
    return parser.parse_args()


def one(seed: int, inner: str, small: bool) -> int:
    """The text of an example, what became of it, and its reports."""
    import mst_fx

    program = generate(seed, small)
    if program is None:
        print("eager mode does not run what was drawn")
        return 0
    print(program.standalone(inner).split(CUT)[-1])
    outcome = check(program, inner)
    print(*mst_fx.reports(), sep="\n")
    print(outcome.kind, outcome.signature, outcome.detail, f"{outcome.looped} looped", sep="\n")
    return int(outcome.kind == FAILED)


class Tally:
    """What became of the examples so far."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.kinds: Counter[str] = Counter()
        self.looped = self.regions = 0
        self.found: dict[str, list[Done]] = defaultdict(list)
        self.first: dict[str, int] = {}
        self.shrunk: dict[str, list[Done]] = defaultdict(list)

    def add(self, done: Done) -> None:
        kind = done.outcome.kind if done.outcome else "not drawn"
        self.kinds[kind] += 1
        if done.outcome is None:
            return
        self.looped += done.outcome.looped > 0
        self.regions += done.outcome.looped
        if kind in (FAILED, TORCH):
            key = done.outcome.signature if kind == FAILED else f"({kind}) {done.outcome.signature}"
            self.found[key].append(done)
            self.first.setdefault(key, sum(self.kinds.values()))

    def line(self) -> str:
        minutes = (time.monotonic() - self.start) / 60
        count = sum(self.kinds.values())
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.kinds.most_common())
        return (
            f"{count} examples in {minutes:.1f} min ({count / minutes:.0f} a minute): {kinds}; "
            f"looped in {self.looped} of the {self.kinds[OK]} that hold ({self.regions} loops)"
        )


def main() -> int:
    args = arguments()
    if args.example is not None:
        return one(args.example, args.inner, args.small)
    tally, pool = Tally(), Pool(args.processes, args.inner)
    shrinking: Counter[str] = Counter()

    def tasks() -> Iterator[Task]:
        for seed in itertools.islice(itertools.count(args.seed), args.examples):
            if time.monotonic() - tally.start > args.seconds:
                return
            yield Task(seed, args.small)

    for done in pool.run(tasks()):
        if done.task.signature:
            tally.shrunk[done.task.signature].append(done)
            tell(done, args.out)
            continue
        tally.add(done)
        if done.outcome and done.outcome.kind == FAILED and failure(done, args, shrinking):
            pool.urgent.append(Task(done.task.seed, args.small, done.outcome.signature))
        if sum(tally.kinds.values()) % 100 == 0:
            print(tally.line(), flush=True)
    summary(tally)
    return int(tally.kinds[FAILED] > 0)


def failure(done: Done, args: argparse.Namespace, shrinking: Counter[str]) -> bool:
    """Tell of one; whether it is to be shrunk."""
    assert done.outcome is not None
    signature = done.outcome.signature
    print(f"seed {done.task.seed}: {signature}", flush=True)
    if signature.startswith(LOST):  # shrinking would lose more processes
        tell(done, args.out)
        return False
    shrinking[signature] += 1
    most = args.shrink * (8 if signature.startswith("wrong") else 1)  # wrong numbers have many causes
    return bool(done.text) and shrinking[signature] <= most


def tell(done: Done, out: Path | None) -> None:
    """A program that failed, shrunk or as it was drawn."""
    name = done.task.signature or (done.outcome.signature if done.outcome else "")
    text = done.text.split(CUT)[-1]
    print(f"--- seed {done.task.seed}, {'shrunk' if done.task.signature else 'as drawn'}: {name}\n{text}", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{done.task.seed}.py").write_text(f"# {name}\n{done.text}")


def summary(tally: Tally) -> None:
    print(tally.line())
    print(f"left out: {tally.kinds[TORCH]} fail without mst_fx as well, in {tally.kinds[UNSTABLE]} rounding decides")
    for signature, found in sorted(tally.found.items(), key=lambda item: -len(item[1])):
        seeds = ", ".join(str(done.task.seed) for done in found[:8])
        print(f"{len(found):5d} {signature}\n      first after {tally.first[signature]}; seeds {seeds}")
    for signature, shrunk in tally.shrunk.items():
        for done in shrunk:
            print(f"      {signature}: seed {done.task.seed} shrunk to {', '.join(done.tags)}")


if __name__ == "__main__":
    sys.exit(main())
