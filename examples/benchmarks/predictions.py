"""How good the predicted peaks are: the report's `peak` and `peak_whole` beside measured peaks, for whole models.

    python examples/benchmarks/predictions.py                          # all models, on a CPU: some minutes
    python examples/benchmarks/predictions.py --device cuda --jobs 9 --json rows.jsonl   # a GPU: about two minutes
    python examples/benchmarks/predictions.py --model ViT T5

A model has random weights and a middle-sized shape. One step is a forward and a backward through Inductor; "plain" is
without loops, "looped" is what mst_fx plans by itself, but for `chunk_tokens` and `min_bytes`, which fit the small
shapes. Peaks are bytes above those that are there before the step (weights and inputs), with gradients: of a profile on
a CPU, `torch.cuda.max_memory_allocated` on a GPU. "Off" is by how much the predicted peak is above (+) or below (-) the
measured one. Float32 on a CPU, bfloat16 on a GPU; `--dtype` says otherwise (QLoRA is bfloat16 in any case).

Each model runs in a process of its own, `--jobs` of them at a time; with `--json`, each row goes to the file as it
comes, one a line. It needs transformers; LoRA needs peft, QLoRA peft and bitsandbytes: a model whose package is missing
is left out, with a word.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak_memory import peak_bytes
from benchmarks.predictions_models import MODELS

import mst_fx

MIB = 2**20
OPTIONS = {"chunk_tokens": 128, "min_bytes": MIB}


@dataclass(frozen=True)
class Row:
    """One model; bytes above those of weights and inputs.

    Attributes:
        plain, plain_predicted: the peak without loops.
        looped, looped_predicted: the peak with them.
        loops: number of loops.
    """

    model: str
    plain: int
    plain_predicted: int
    looped: int
    looped_predicted: int
    loops: int

    def __str__(self) -> str:
        cells = [self.model]
        for measured, predicted in ((self.plain, self.plain_predicted), (self.looped, self.looped_predicted)):
            off = predicted / measured - 1
            cells += [f"{measured / MIB:.1f}", f"{predicted / MIB:.1f}", f"{off:+.0%}" if round(off, 2) else "0%"]
        return "| " + " | ".join([*cells, str(self.loops)]) + " |"


def row_of(name: str, options: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Row:
    """Measure and predict one model."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        loss, given = MODELS[name]()
    torch.set_default_dtype(before)
    resident = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in given}.values())
    trained = [x for x in given if x.requires_grad]

    def measured(compiled: Callable[[], torch.Tensor]) -> int:
        def step() -> None:
            torch.autograd.grad(compiled(), trained, allow_unused=True)

        step()
        return peak_bytes(step, device)

    torch._dynamo.reset()
    plain = measured(torch.compile(loss))
    torch._dynamo.reset()
    made = len(mst_fx.reports())
    looped = measured(torch.compile(loss, backend="mst_fx", options=options))
    reports = mst_fx.reports()[made:]
    report = sum(reports[1:], reports[0])
    return Row(name, plain, report.peak_whole - resident, looped, report.peak - resident, len(report.regions))


def alone(name: str, args: argparse.Namespace) -> Row | str:
    """Run one model in a process of its own; return why it does not run, where it does not."""
    command = [sys.executable, __file__, "--alone", "--model", name, "--device", args.device, "--dtype", args.dtype]
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    done = subprocess.run(
        [*command, "--chunk-tokens", str(args.chunk_tokens)],
        capture_output=True,
        text=True,
        env={**os.environ, **threads},
        check=False,
    )
    if done.returncode == 0:
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    error = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return error[0] if error else f"exit status {done.returncode}"


def rows(names: list[str], args: argparse.Namespace) -> Iterator[tuple[str, Row | str]]:
    """Yield each model with its row, or with why it has none, as they come."""
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {pool.submit(alone, name, args): name for name in names}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--chunk-tokens", type=int, default=OPTIONS["chunk_tokens"])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--json", type=Path, help="a file that rows are added to, one a line")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.alone:
        options = OPTIONS | {"chunk_tokens": args.chunk_tokens}
        print(json.dumps(asdict(row_of(args.model[0], options, args.device, getattr(torch, args.dtype)))))
        return
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    about = {"torch": torch.__version__, "device": machine, "dtype": args.dtype, "date": str(datetime.date.today())}
    print(f"{', '.join(about.values())}; MiB above weights and inputs\n")
    print("| model | plain | predicted | off | looped | predicted | off | loops |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows(args.model, args):
        print(row if isinstance(row, Row) else f"left out: {name}: {row}", flush=True)
        if args.json and isinstance(row, Row):
            with args.json.open("a") as file:
                file.write(json.dumps(about | asdict(row)) + "\n")


if __name__ == "__main__":
    main()
