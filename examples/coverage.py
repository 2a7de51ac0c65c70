"""Every architecture of the installed transformers, and models of other packages, trained for one step.

    python examples/coverage.py                      # all of them: more than an hour on two cores
    python examples/coverage.py --tasks causal-lm,others --only llama,mamba --jobs 4

For each architecture a tiny random model (`tiny_models.py`, `other_models`) runs one training step in eager mode, with
torch.compile and with mst_fx, in a process of its own. Loss and gradients are compared with those of a float64 step,
under eager's own error. The MLPs, experts and heads that a model has are counted in the matrix products that eager runs
(`Products`); what is looped, what is not and why come from the reports. Each result is a file in `--out`; a second run
takes up where the first one stopped. `coverage.md` and `coverage.json` there hold the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch
import torch._dynamo.testing
import transformers
from coverage_report import Result, summary, table
from other_models import other_cases
from tiny_models import FEED_FORWARD, TASKS, cases, set_experts
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from tqdm import tqdm

import mst_fx

EXACT = 1e-9  # of float64, where float32 differs by more: a model may amplify rounding
LIMIT_S = 600
CHUNK = 16
TOLERANCE, HALF_TOLERANCE = 2e-6, 2e-2  # of float32 beside twice eager's own error, and of bfloat16 beside eager's
aten = torch.ops.aten


class Case(Protocol):
    """A model to train: its name, the size of its vocabulary (0 for none), and the model with a batch."""

    @property
    def name(self) -> str:
        """A unique name that can be a file name."""

    @property
    def vocabulary(self) -> int:
        """The width of logits."""

    def training(self) -> tuple[nn.Module, dict[str, Any]]:
        """Return the model, which returns its loss, or an object that has it, and one batch; the same each time."""


class Products(TorchDispatchMode):
    """Counts the MLPs, expert layers and heads that a forward runs, by its matrix products.

    An MLP is a product that widens the tokens, ops that keep tokens apart, and a product that narrows them again.
    Experts are counted by the products that narrow, heads by the vocabulary.

    Args:
        vocabulary: the width of logits.
        above: products of at most this many tokens do not count: those of loops.
    """

    def __init__(self, vocabulary: int, above: int = 0) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.above = above
        self.mlps = self.experts = self.heads = 0
        self.wide = WeakTensorKeyDictionary()  # values made of widened tokens, and of nothing else as large
        self.mixed = WeakTensorKeyDictionary()  # values in which widened tokens have met

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, and count it."""
        result = func(*args, **(kwargs or {}))
        if func in (aten.mm.default, aten.addmm.default):
            tokens, weight = args[-2:]
            inner, outer = weight.shape
            if min(inner, outer) < LOW_RANK or tokens.shape[0] <= self.above:  # adapters, beside what they adapt
                return result
            whole = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
            self.mlps += outer < inner and tokens in self.wide and whole
            self.experts += outer < inner and tokens in self.wide and not whole
            self.heads += outer == self.vocabulary and outer > inner
            if outer > inner and outer != self.vocabulary:
                self.wide[result] = True
        elif func in (aten.bmm.default, aten._grouped_mm.default):
            self.experts += args[0].shape[-1] in FEED_FORWARD and max(result.shape[1:]) < min(FEED_FORWARD)
        else:
            self._follow(func, (args, kwargs), result)
        return result

    def _follow(self, func: Any, given: Any, result: Any) -> None:
        """Store whether results are made of widened tokens, and whether tokens have met in them."""
        operands = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
        mixes = any(word in func.__name__ for word in MIXING) and any(x in self.wide for x in operands)
        for made in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            large = [x for x in operands if 2 * x.numel() >= made.numel()]
            if mixes or any(x in self.mixed for x in operands):
                self.mixed[made] = True
            elif large and all(x in self.wide for x in large) and not any(word in func.__name__ for word in MIXING):
                self.wide[made] = True


LOW_RANK = 8
MIXING = ("conv", "attention", "batch_norm", "cum", "sort", "scan", "fft", "index", "gather", "pool")
"""Substrings of the names of ops that make tokens depend on one another, or may do so."""


def examine(case: Case, inner: str, dynamic: bool | None = None) -> Result:
    """Run the steps of one architecture."""
    result = Result(case.name)
    torch.set_num_threads(1)
    torch._dynamo.reset()
    stage = "not built"
    try:
        model, batch = case.training()
        stage = "eager fails"
        products = Products(case.vocabulary)
        with products:
            model(**batch)
        result.mlps, result.experts, result.heads = products.mlps, products.experts, products.heads
        eager = step(model, batch, loss_of(model))
        if not all(bool(value.isfinite().all()) for value in eager.values()):
            raise ValueError("the loss or a gradient is not finite")
        truth = exact_step(case, eager)
        stage = "not ours"
        counted = torch._dynamo.testing.CompileCounterWithBackend(inner)
        unlooped = Counting(counted, case.vocabulary)
        plain = step(model, batch, torch.compile(loss_of(model), backend=unlooped, dynamic=dynamic))
        result.plain, result.plain_graphs, result.plain_error = "ok", counted.frame_count, difference(truth, plain)
        stage = "fails"
        looped, watched = looped_step(model, batch, inner, dynamic, case.vocabulary)
        result.eager_error, result.mst_error = difference(truth, eager), difference(truth, looped)
        result.mlps_looped = max(watched.looped("mlp", "experts"), unlooped.whole("mlps") - watched.whole("mlps"))
        result.heads_looped = max(watched.looped("head"), unlooped.whole("heads") - watched.whole("heads"))
        result.graphs, result.refusals, result.left = watched.graphs, watched.refusals(), watched.left()
        if result.experts and set_experts(model, "grouped_mm"):
            group(result, model.to(torch.bfloat16), batch, inner, dynamic)
        same = result.mst_error <= 2 * max(result.eager_error, result.plain_error) + TOLERANCE
        if not same and truth is not eager:
            wide = exact_step(case, eager, lambda *given: looped_step(*given, inner, dynamic)[0])
            same = difference(truth, wide) <= EXACT
            result.error = f"in float64 the difference is {difference(truth, wide):.0e}"
        result.status = "trains" if same and result.grouped_error <= HALF_TOLERANCE else "differs"
    except Exception as error:
        result.status = stage
        last = traceback.extract_tb(error.__traceback__)[-1]
        result.error = f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"
    return result


def exact_step(
    case: Case, eager: dict[str, torch.Tensor], run: Callable[..., dict[str, torch.Tensor]] | None = None
) -> dict[str, torch.Tensor]:
    """Return loss and gradients in float64, by `run` in place of an eager step; `eager` if a model fixes its dtype."""
    model, batch = case.training()
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    try:
        return step(model.double(), wide, loss_of(model)) if run is None else run(model.double(), wide)
    except (RuntimeError, ValueError, TypeError):
        return eager


def group(result: Result, model: nn.Module, batch: dict[str, Any], inner: str, dynamic: bool | None) -> None:
    """Run the same once more with grouped products, which compile only in bfloat16."""
    half = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    try:
        truth = step(model, half, loss_of(model))
    except RuntimeError:  # eager's own error: a router that has to stay in float32, say
        return
    looped, watched = looped_step(model, half, inner, dynamic)
    result.grouped_error = difference(truth, looped)
    result.grouped_looped = watched.looped("mlp", "experts")
    result.refusals += [f"grouped: {refusal}" for refusal in watched.refusals()]


def looped_step(
    model: nn.Module, batch: dict[str, Any], inner: str, dynamic: bool | None, vocabulary: int = 0
) -> tuple[dict[str, torch.Tensor], Watched]:
    """Run a step with mst_fx, in loops with chunks of CHUNK tokens; each loop is verified first."""
    torch._dynamo.reset()
    options = {"inner": inner, "min_bytes": 0, "chunk_tokens": CHUNK, "strict": True, "verify": True}
    watched = Watched(options, vocabulary)
    return step(model, batch, torch.compile(loss_of(model), backend=watched, dynamic=dynamic)), watched


def loss_of(model: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """Return the function to compile: it computes the loss."""

    def loss(**batch: Any) -> torch.Tensor:
        out = model(**batch)
        return out if isinstance(out, torch.Tensor) else out.loss

    return loss


def step(model: torch.nn.Module, batch: dict[str, Any], loss_fn: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """Return loss and gradients by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = loss_fn(**batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def difference(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> float:
    """Return the largest error, relative to the largest element of its tensor (or to 1e-3 of the largest of all).

    A missing gradient counts as zeros.
    """
    largest = max(float(value.abs().max()) for value in expected.values() if value.numel())
    errors = [0.0]
    for name in expected.keys() | actual.keys():
        pair = expected.get(name), actual.get(name)
        wanted, got = (torch.zeros_like(next(x for x in pair if x is not None)) if v is None else v for v in pair)
        if wanted.numel():
            scale = max(float(wanted.abs().max()), 1e-3 * largest, 1e-30)
            errors.append(float((got - wanted).abs().max()) / scale)
    return max(errors) if all(error == error for error in errors) else float("inf")


class Counting:
    """A backend that counts the MLPs and heads that graphs run outside of loops: one loop may hold several."""

    def __init__(self, compiler: Callable[..., Callable[..., Any]], vocabulary: int) -> None:
        self.compiler = compiler
        self.vocabulary = vocabulary
        self.counts: list[Products] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """Compile a graph."""
        compiled = self.compiler(gm, example_inputs)

        def run(*args: Any) -> Any:
            self.counts.append(Products(self.vocabulary, above=CHUNK))
            with self.counts[-1]:
                return compiled(*args)

        return run

    def whole(self, what: str) -> int:
        """Return the number of "mlps" or "heads" of more than a chunk of tokens."""
        return sum(getattr(products, what) for products in self.counts)


class Watched(Counting):
    """The backend with mst_fx; it records the report of a graph, too, each time that the graph runs."""

    def __init__(self, options: dict[str, Any], vocabulary: int) -> None:
        super().__init__(partial(mst_fx.backend, options=options), vocabulary)
        self.runs: list[mst_fx.Report] = []
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """Compile a graph."""
        compiled = super().__call__(gm, example_inputs)
        report = mst_fx.reports()[-1]
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs.append(report)
            return compiled(*args)

        return run

    def looped(self, *parts: str) -> int:
        """Return the number of looped regions whose pattern's name contains one of these texts."""
        regions = (region for report in self.runs for region in report.regions)
        return sum(any(part in region.pattern for part in parts) for region in regions)

    def refusals(self) -> list[str]:
        """Return every refusal once, with the line of the model, and every loop that could not be verified."""
        found = [(r.pattern, r.reason, r.text, r.source) for report in self.runs for r in report.refusals]
        regions = [region for report in self.runs for region in report.regions if not region.verified]
        found += [(region.pattern, "not verified", region.verification, region.source) for region in regions]
        lines = (f"{p} {reason}: {text} ({source.strip().rpartition('/')[2]})" for p, reason, text, source in found)
        return list(dict.fromkeys(lines))

    def left(self) -> list[str]:
        """Return the largest values that no loop covers, each kind once, in the words of the report."""
        values = (value for report in self.runs for value in report.unlooped)
        lines = (f"{v.reason}: {v.op}: {v.why} ({v.source.strip().rpartition('/')[2]})" for v in values)
        return list(dict.fromkeys(lines))


def run_one(case: Case, run: Callable[[Case], Result], path: Path) -> None:
    """Examine one case in a process of its own, and write a file."""
    start = time.time()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    result = run(case)
    result.seconds = round(time.time() - start, 1)
    path.write_text(json.dumps(asdict(result), indent=1))


def sweep(todo: list[Case], run: Callable[[Case], Result], out: Path, jobs: int) -> Iterator[Path]:
    """Run the cases, `jobs` at a time; yield the file of each as it ends."""
    context = multiprocessing.get_context("fork")  # a fork imports torch and transformers once
    running: dict[Any, tuple[Any, Case, float]] = {}
    pending = list(reversed(todo))
    while pending or running:
        while pending and len(running) < jobs:
            case = pending.pop()
            process = context.Process(target=run_one, args=(case, run, out / f"{case.name}.json"))
            process.start()
            running[process.sentinel] = (process, case, time.time())
        ended = wait(list(running), timeout=1)
        for sentinel, (process, case, start) in list(running.items()):
            if sentinel not in ended and time.time() - start < LIMIT_S:
                continue
            process.kill() if sentinel not in ended else process.join()
            del running[sentinel]
            path = out / f"{case.name}.json"
            if not path.exists():
                why = f"no result after {LIMIT_S} s" if sentinel not in ended else f"exit code {process.exitcode}"
                path.write_text(json.dumps(asdict(Result(case.name, "fails", why)), indent=1))
            yield path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join([*TASKS, "others"]), help="tasks of transformers, and: others")
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--inner", default="aot_eager", help="what compiles the graphs, with mst_fx and without")
    parser.add_argument("--dynamic", action="store_true", help="compile for any length and any value of a float")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("coverage"))
    parser.add_argument("--again", default="", help="statuses to run again, separated by commas")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has forked cannot use a GPU
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.out.mkdir(exist_ok=True)
    tasks = args.tasks.split(",")
    others, missing = other_cases() if "others" in tasks else ([], [])
    every: list[Case] = [*cases(tuple(task for task in tasks if task in TASKS)), *others]
    found = [case for case in every if any(part in case.name for part in args.only.split(","))]
    todo = []
    for case in found:
        path = args.out / f"{case.name}.json"
        if path.exists() and json.loads(path.read_text())["status"] in args.again.split(","):
            path.unlink()
        if not path.exists():
            todo.append(case)
    run = partial(examine, inner=args.inner, dynamic=args.dynamic or None)
    for _ in tqdm(sweep(todo, run, args.out, args.jobs), total=len(todo), smoothing=0.05):
        pass
    results = [Result(**json.loads((args.out / f"{case.name}.json").read_text())) for case in found]
    (args.out / "coverage.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    (args.out / "coverage.md").write_text(table(results, missing))
    print(summary(results))


if __name__ == "__main__":
    main()
