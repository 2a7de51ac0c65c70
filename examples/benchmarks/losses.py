"""Which losses over a large head are looped: mst_fx beside its peers, row by row.

    python examples/benchmarks/losses.py                  # a GPU: peaks; about two minutes with 5 processes
    python examples/benchmarks/losses.py --device cpu     # anywhere: bytes saved for backward

Every row is a loss as users write it. The compilers (torch.compile, Inductor's auto_chunker, mst_fx) are given that
code; libraries are called where they have a function for it. One forward and backward in bfloat16 (float32 on a CPU).

    loops       right, and at most half of what plain torch.compile takes, above gradients and what must exist
    falls back  right, with more memory than that
    wrong       other values or gradients than eager's
    breaks      an exception
    -           the library has no such function, or is not installed

"Right" means: loss and gradients within 3 % (bfloat16) or 0.1 % (float32) of eager's in float32. Libraries whose
formula differs are marked with "~", and their values are not compared. Prints a Markdown table; --json writes the
numbers.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # else a method may be served another one's code

import torch
from losses_methods import LIBRARIES, METHODS, OWN_FORMULA, compilers
from losses_rows import ROWS, B, Loss


@dataclass
class Cell:
    """One method on one row; `bytes` above gradients and what must exist."""

    row: str
    method: str
    status: str
    bytes: int = 0
    error: str = ""


@dataclass(frozen=True)
class Shape:
    """Sizes of the work."""

    device: str
    tokens: int
    width: int
    vocabulary: int

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and head."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def tensors(shape: Shape) -> list[torch.Tensor]:
    torch.manual_seed(0)
    options: Any = {"device": shape.device, "dtype": shape.dtype}
    x = torch.randn(B, shape.tokens // B, shape.width, **options)
    w = torch.randn(shape.vocabulary, shape.width, **options) * shape.width**-0.5
    y = torch.randint(0, shape.vocabulary, x.shape[:2], device=shape.device)
    return [x.requires_grad_(), w.requires_grad_(), y]


def step(loss: Loss, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """One forward and backward; the first result is the loss, or is summed up with fixed weights."""
    for tensor in inputs[:2]:
        tensor.grad = None
    result = loss(*inputs)
    parts = result if isinstance(result, tuple) else (result,)
    total = parts[0]
    if total.numel() > 1:
        weights = torch.linspace(-1, 1, total.numel(), device=total.device).view_as(total) / total.numel()
        total = sum((part * weights).sum() for part in parts if part.requires_grad)
    total.backward()
    return total.detach()


def saved_bytes(loss: Loss, inputs: Sequence[torch.Tensor]) -> int:
    """Bytes of the storages that a forward saves for backward, inputs left out."""
    storages: dict[int, int] = {}
    keep = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        keep.append(x)
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = loss(*inputs)
    for tensor in inputs:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())


def measured(loss: Loss, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The loss, and the bytes; the step has run once before."""
    value = step(loss, inputs)
    if not inputs[0].is_cuda:
        return value, saved_bytes(loss, inputs)
    for tensor in inputs[:2]:
        tensor.grad = None
    give_back()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    value = step(loss, inputs)
    torch.cuda.synchronize()
    return value, torch.cuda.max_memory_allocated() - start - gradient_bytes(inputs)


def give_back() -> None:
    """Free what nobody uses: other processes share the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gradient_bytes(inputs: Sequence[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in inputs[:2])


def distance(got: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Largest norm of a difference over the norm of the truth, over the loss and the gradients."""
    pairs = zip(got, truth, strict=True)
    return max(float((a.float() - b).norm() / b.norm().clamp_min(1e-20)) for a, b in pairs)


def truth_of(loss: Loss, shape: Shape) -> list[torch.Tensor]:
    """Loss and gradients of the same inputs in eager float32."""
    exact = [t.detach().float().requires_grad_() if t.is_floating_point() else t for t in tensors(shape)]
    value = step(loss, exact)
    return [value, *(t.grad for t in exact[:2])]


def measure_row(title: str, shape: Shape) -> list[Cell]:
    """Every method on one row."""
    loss, inputs = ROWS[title], tensors(shape)
    truth = truth_of(loss, shape)
    give_back()
    methods: dict[str, tuple[Loss | None, bool]] = {name: (fn, True) for name, fn in compilers(loss).items()}
    for name, library in LIBRARIES.items():
        try:
            known = library()
        except (ImportError, AttributeError):
            known = {}
        methods[name] = (known.get(title) or known.get(title + OWN_FORMULA), title in known)
    cells: list[Cell] = []
    for name, (fn, compared) in methods.items():
        if fn is None:
            cells.append(Cell(title, name, "-"))
            continue
        try:
            torch._dynamo.reset()
            value, size = measured(fn, inputs) if step(fn, inputs) is not None else (None, 0)
            off = distance([value, *(t.grad for t in inputs[:2])], truth) if compared else 0.0
        except Exception as error:
            cells.append(Cell(title, name, "breaks", error=f"{type(error).__name__}: {error}"[:300]))
            continue
        finally:
            give_back()
        cells.append(judged(title, name, size, off, compared, cells, shape))
    return cells


def judged(title: str, name: str, size: int, off: float, compared: bool, before: list[Cell], shape: Shape) -> Cell:
    """Name what was seen."""
    must_exist = 0
    if title.startswith("the logits are returned"):
        must_exist = shape.tokens * shape.vocabulary * shape.dtype.itemsize * (2 if shape.device == "cuda" else 1)
    size = max(0, size - must_exist)
    if off > (3e-2 if shape.dtype == torch.bfloat16 else 1e-3):
        return Cell(title, name, "wrong", size, error=f"off by {off:.3f}")
    plain = before[0].bytes if before and before[0].method == "torch.compile" else size
    looped = bool(before) and size <= plain / 2
    mark = "" if compared else " " + OWN_FORMULA
    return Cell(title, name, ("loops" if looped else "falls back" if before else "whole") + mark, size)


def table(cells: list[Cell]) -> str:
    lines = ["| | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for title in dict.fromkeys(cell.row for cell in cells):
        found = {cell.method: cell for cell in cells if cell.row == title}
        lines.append(f"| {title} | " + " | ".join(shown(found[method]) for method in METHODS) + " |")
    return "\n".join(lines)


def shown(cell: Cell) -> str:
    if cell.status in ("-", "breaks", "wrong"):
        return cell.status
    size = f"{cell.bytes / 2**30:.2f} GiB" if cell.bytes >= 2**28 else f"{cell.bytes / 2**20:.1f} MiB"
    return size if cell.status == "whole" else f"{cell.status}, {size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="*", help="parts of titles; all by default")
    parser.add_argument("--processes", type=int, default=5 if torch.cuda.is_available() else 1)
    parser.add_argument("--json")
    given = parser.parse_args()
    large = given.device == "cuda"
    shape = Shape(given.device, *((16_384, 2048, 32_768) if large else (2048, 64, 8192)))
    titles = [title for title in ROWS if not given.rows or any(part in title for part in given.rows)]
    cells: list[Cell] = []
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        for title, made in zip(titles, pool.map(measure_row, titles, [shape] * len(titles)), strict=True):
            print(f"# {title}: " + ", ".join(f"{cell.method} {shown(cell)} {cell.error}" for cell in made), flush=True)
            cells += made
    name = torch.cuda.get_device_name() if large else "CPU"
    print(f"\n{name}, torch {torch.__version__}, {datetime.date.today()}, mst_fx {version('mst_fx')}; {shape}\n")
    print(table(cells))
    if given.json:
        with open(given.json, "w") as file:
            json.dump([asdict(cell) for cell in cells], file, indent=1)


if __name__ == "__main__":
    main()
