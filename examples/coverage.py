"""Every architecture of the installed transformers, trained for one step with mst_fx and without.

    python examples/coverage.py                      # all of them: about an hour on two cores
    python examples/coverage.py --tasks causal-lm --only llama,mamba --jobs 4

For each architecture a tiny random model (`tiny_models.py`) runs one training step in eager mode, with torch.compile
and with mst_fx, in a process of its own. Loss and gradients are compared with eager's. The MLPs and heads that a model
has are counted in eager's matrix products, by the widths that the tiny configs reserve for them; what is looped and
refused comes from the reports. Each result is a file in `--out`; a second run takes up where the first one stopped.
`coverage.md` and `coverage.json` there hold the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import FEED_FORWARD, TASKS, VOCAB, Case, cases, inputs, make, set_experts
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import mst_fx

LIMIT_S = 600
TOLERANCE = 1e-4
aten = torch.ops.aten


@dataclass
class Result:
    """What became of one architecture. Errors are the largest ones over all parameters, relative to each's size."""

    name: str
    status: str = ""
    error: str = ""
    plain: str = ""
    plain_error: float = 0.0
    mst_error: float = 0.0
    mlps: int = 0
    mlps_looped: int = 0
    experts: int = 0
    experts_looped: int = 0
    grouped_looped: int = 0
    grouped_error: float = 0.0
    heads: int = 0
    heads_looped: int = 0
    graphs: int = 0
    refusals: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Products(TorchDispatchMode):
    """Counts the matrix products that narrow an MLP's width, and those that make logits."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = self.experts = self.heads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (aten.mm.default, aten.addmm.default):
            weight = args[-1]
            whole = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
            inner, outer = weight.shape
            if inner in FEED_FORWARD and outer < inner:
                self.mlps += whole
                self.experts += not whole
            self.heads += outer == VOCAB
        if func in (aten.bmm.default, aten._grouped_mm.default):
            self.experts += any(size in FEED_FORWARD for size in args[0].shape[1:]) and max(result.shape[1:]) < 112
        return result


def examine(case: Case, inner: str) -> Result:
    """Run the steps of one architecture."""
    result = Result(case.name)
    torch.set_num_threads(1)
    stage = "not built"
    try:
        model, batch = make(case), inputs(case, make(case))
        stage = "eager fails"
        products = Products()
        with products:
            model(**batch)
        result.mlps, result.experts, result.heads = products.mlps, products.experts, products.heads
        truth = step(model, batch, loss_of(model))
        stage = "not ours"
        result.plain = "ok"
        plain = step(model, batch, torch.compile(loss_of(model), backend=inner))
        result.plain_error = difference(truth, plain)
        torch._dynamo.reset()
        stage = "fails"
        watched = Watched({"inner": inner, "min_bytes": 0, "chunk_tokens": 16, "strict": True})
        looped = step(model, batch, torch.compile(loss_of(model), backend=watched))
        result.mst_error = difference(truth, looped)
        watched.tell(result)
        if result.experts and set_experts(model, "grouped_mm"):
            torch._dynamo.reset()
            model.to(torch.bfloat16)
            batch = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
            truth = step(model, batch, loss_of(model))
            grouped = Watched({"inner": inner, "min_bytes": 0, "chunk_tokens": 16, "strict": True})
            result.grouped_error = difference(truth, step(model, batch, torch.compile(loss_of(model), backend=grouped)))
            grouped_result = Result("")
            grouped.tell(grouped_result)
            result.grouped_looped = grouped_result.experts_looped
            result.refusals += ["grouped: " + x for x in grouped_result.refusals]
        bound = max(TOLERANCE, 2 * result.plain_error)
        result.status = "trains" if result.mst_error <= bound else "differs"
    except Exception as error:
        result.status = stage
        last = traceback.extract_tb(error.__traceback__)[-1]
        result.error = f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"
    return result


def loss_of(model: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """The function that is compiled."""

    def loss(**batch: Any) -> torch.Tensor:
        return model(**batch).loss

    return loss


def step(model: torch.nn.Module, batch: dict[str, Any], loss_fn: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """Loss and gradients by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = loss_fn(**batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def difference(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> float:
    """The largest error of a value, relative to the largest element of its tensor (or 1e-3 of the largest of all)."""
    if expected.keys() != actual.keys():
        return float("inf")
    largest = max(float(value.abs().max()) for value in expected.values() if value.numel())
    worst = 0.0
    for name, value in expected.items():
        if value.numel():
            scale = max(float(value.abs().max()), 1e-3 * largest, 1e-30)
            error = float((actual[name] - value).abs().max()) / scale
            worst = error if error > worst or error != error else worst
    return worst if worst == worst else float("inf")


class Watched:
    """The backend, counting what each compiled graph loops as often as it runs."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.runs: list[mst_fx.report.Report] = []
        self.refusals: dict[str, None] = {}
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        compiled = mst_fx.backend(gm, example_inputs, options=self.options)
        report = mst_fx.reports()[-1]
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs.append(report)
            return compiled(*args)

        return run

    def tell(self, result: Result) -> None:
        """Fill in what was looped and refused."""
        regions = [region for report in self.runs for region in report.regions]
        result.heads_looped = sum(region.pattern == "head" for region in regions)
        result.mlps_looped = sum("mlp" in region.pattern for region in regions)
        result.experts_looped = sum("expert" in region.pattern for region in regions)
        result.graphs = self.graphs
        for report in self.runs:
            for refusal in report.refusals:
                where = refusal.source.strip().rpartition("/")[2]
                result.refusals.append(f"{refusal.pattern} {refusal.reason}: {refusal.text} | {where}")
        result.refusals = list(dict.fromkeys(result.refusals))


def run_one(case: Case, inner: str, path: Path) -> None:
    """In a process of its own: examine, and leave a file."""
    start = time.time()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    result = examine(case, inner)
    result.seconds = round(time.time() - start, 1)
    path.write_text(json.dumps(asdict(result), indent=1))


def sweep(todo: list[Case], inner: str, out: Path, jobs: int) -> Iterator[Path]:
    """Run the cases, `jobs` at a time; yields the file of each as it ends."""
    context = multiprocessing.get_context("fork")  # torch and transformers are imported once
    running: dict[Any, tuple[Any, Case, float]] = {}
    pending = list(reversed(todo))
    while pending or running:
        while pending and len(running) < jobs:
            case = pending.pop()
            process = context.Process(target=run_one, args=(case, inner, out / f"{case.name}.json"))
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


def summary(results: list[Result]) -> str:
    """The totals, and who fell short of them."""
    trained = [result for result in results if result.plain == "ok"]
    right = [result for result in trained if result.status == "trains"]
    lines = [f"{len(results)} architectures; plain torch.compile trains {len(trained)}."]
    lines += [f"Same loss and gradients with mst_fx: {len(right)} of {len(trained)}."]
    lines += [f"    {r.name} {r.status}: {r.mst_error:.0e} {cell(r.error)}" for r in trained if r not in right]
    for what, found, looped in (
        ("every dense MLP", "mlps", "mlps_looped"),
        ("every expert layer (one matrix a row, float32)", "experts", "experts_looped"),
        ("every expert layer (grouped, bfloat16)", "experts", "grouped_looped"),
        ("the head", "heads", "heads_looped"),
    ):
        having = [result for result in right if getattr(result, found)]
        short = [result for result in having if getattr(result, looped) < expected(result, found)]
        lines.append(f"With {what} looped: {len(having) - len(short)} of {len(having)}.")
        lines += [f"    not {result.name}: {getattr(result, looped)} of {expected(result, found)}" for result in short]
    lines += [f"Not ours: {status}: {n}" for status, n in Counter(r.status for r in results if r.plain != "ok").items()]
    return "\n".join(lines)


def expected(result: Result, found: str) -> int:
    """What there is to loop; experts are counted by their down-projections."""
    return int(getattr(result, found))


def table(results: list[Result]) -> str:
    """One row an architecture, in Markdown."""
    packages = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [f"# Coverage\n\n{packages}\n\n```text\n{summary(results)}\n```\n"]
    lines.append("| architecture | torch.compile | mst_fx | error | MLPs | experts | head | refusals, or what failed |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in results:
        counts = [f"{r.mlps_looped} / {r.mlps}", f"{r.experts_looped} / {r.experts}", f"{r.heads_looped} / {r.heads}"]
        why = "<br>".join(cell(text) for text in [*r.refusals, r.error] if text)
        error = f"{r.mst_error:.0e}" if r.plain == "ok" else ""
        lines.append(f"| {r.name} | {r.plain or r.status} | {r.status} | {error} | {' | '.join(counts)} | {why} |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text that does not break a table."""
    return " ".join(text.split()).replace("|", "/")[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--inner", default="aot_eager", help="what compiles the graphs, with mst_fx and without")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("coverage"))
    parser.add_argument("--again", default="", help="statuses to run again, separated by commas")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.out.mkdir(exist_ok=True)
    found = [c for c in cases(tuple(args.tasks.split(","))) if any(part in c.name for part in args.only.split(","))]
    todo = []
    for case in found:
        path = args.out / f"{case.name}.json"
        if path.exists() and json.loads(path.read_text())["status"] in args.again.split(","):
            path.unlink()
        if not path.exists():
            todo.append(case)
    for _ in tqdm(sweep(todo, args.inner, args.out, args.jobs), total=len(todo), smoothing=0.05):
        pass
    results = [Result(**json.loads((args.out / f"{case.name}.json").read_text())) for case in found]
    (args.out / "coverage.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    (args.out / "coverage.md").write_text(table(results))
    print(summary(results))


if __name__ == "__main__":
    main()
