"""The MLP of one layer of Llama-3-8B in few bits, forward + backward: mst_fx beside torch.compile, in one process.

    python examples/benchmarks/quantised.py                          # a GPU that multiplies float8; about three minutes
    python examples/benchmarks/quantised.py --work 4bit --tokens 16384 65536 --json rows.json
    python examples/benchmarks/quantised.py --small                  # anywhere: tiny shapes, times only

    4bit      frozen NF4 weights of bitsandbytes, and an adapter of rank 16 on each
    8bit      frozen int8 weights of bitsandbytes (a GPU multiplies in int8), and the same adapters
    float8    trained weights; products in float8 by torchao, with a scale a row, but for the weights' gradients
    float8 f  frozen weights, all products in float8 with a scale a row (torchao), and the same adapters

Times are medians over rounds in which every method takes its turn. "Peak" is device memory above the weights and the
inputs, gradients included. "Looped" counts the loops of mst_fx's report. A package that is not installed is an error in
its rows. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint
from turns import Row, Step, measure, save

import mst_fx

RANK = 16
PACKAGES = ("bitsandbytes", "torchao", "triton")


@dataclass(frozen=True)
class Shape:
    """Sizes of the MLP."""

    hidden: int
    wide: int


class Mlp(nn.Module):
    """SwiGLU with a norm in front and the residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden)
        self.gate, self.up = (nn.Linear(shape.hidden, shape.wide, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.wide, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Adapted(nn.Module):
    """A linear layer, and an adapter of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.narrow = nn.Linear(base.in_features, RANK, bias=False, dtype=torch.bfloat16)
        self.widen = nn.Linear(RANK, base.out_features, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.base(x) + self.widen(self.narrow(x))


def changed(model: Mlp, change: Callable[[nn.Linear], nn.Module]) -> Mlp:
    """The model with other layers in place of its linear ones."""
    for name in ("gate", "up", "down"):
        setattr(model, name, change(getattr(model, name)))
    return model


def adapted(model: Mlp) -> Mlp:
    return changed(model.requires_grad_(False), Adapted)


def packed(bits: int, layer: nn.Linear) -> nn.Module:
    """The layer with a weight that is packed when it moves to the device."""
    import bitsandbytes as bnb

    sizes = (layer.in_features, layer.out_features)
    if bits == 8:
        new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    new.weight.data = layer.weight.data
    return new


def in_float8(recipe: str, model: Mlp) -> Mlp:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))


WORK: dict[str, Callable[[Mlp], Mlp]] = {
    "4bit": lambda model: adapted(changed(model, partial(packed, 4))),
    "8bit": lambda model: adapted(changed(model, partial(packed, 8))),
    "float8": partial(in_float8, "rowwise_with_gw_hp"),
    "float8 f": lambda model: adapted(in_float8("rowwise", model)),
}


def methods_of(model: Mlp, chunks: Sequence[int]) -> dict[str, Callable[..., torch.Tensor]]:
    """What runs the model, by name; `chunks` are lengths to try beside the plan's."""

    def recomputed(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(model, x, use_reentrant=False)
        return result

    def looped(**options: Any) -> Callable[..., torch.Tensor]:
        return torch.compile(lambda x: model(x), backend=mst_fx.backend, options={"min_bytes": 0, **options})

    return {
        "torch.compile": torch.compile(lambda x: model(x)),
        "torch.compile + checkpointing": torch.compile(recomputed),
        "**mst_fx**": looped(),
        **{f"mst_fx, {chunk:,} tokens": looped(chunk_tokens=chunk) for chunk in chunks},
    }


def run(name: str, tokens: int, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """All methods on one kind of weights, at one length."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    shape = Shape(64, 256) if args.small else Shape(4096, 14336)
    try:
        model = WORK[name](Mlp(shape).to(torch.bfloat16)).to(device)
    except Exception as error:
        return [Row(name, tokens, "all", error=f"{type(error).__name__}: {error}".splitlines()[0][:100])]
    x = torch.randn(1, tokens, shape.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    made = len(mst_fx.reports())
    steps = {method: partial(step, fn, x, leaves, upstream) for method, fn in methods_of(model, args.chunks).items()}
    rows = measure([Row(name, tokens, method) for method in steps], steps, args.rounds, leaves)
    loops = [len(report.regions) for report in mst_fx.reports()[made:]]
    told = [f" (looped: {count})" for count in loops] if len(loops) == len(rows) - 2 else []
    return rows[:2] + [replace(row, method=row.method + text) for row, text in zip(rows[2:], told, strict=True)]


def step(fn: Step, x: torch.Tensor, leaves: Sequence[torch.Tensor], upstream: torch.Tensor) -> None:
    """Forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    fn(x).backward(upstream)


def table(rows: Sequence[Row]) -> str:
    """A table of one kind of weights at one length; ratios are to the first method that has numbers."""
    done = [row for row in rows if not row.error]
    gradients = f"{done[0].gradients_gib:.2f}" if done else "-"
    title = f"{rows[0].work}, {rows[0].tokens:,} tokens"
    lines = ["", f"| {title} | ms | ratio | peak GiB (gradients {gradients}) |", "|---|---|---|---|"]
    for row in rows:
        ratio = "-" if row.error else f"{row.ms / done[0].ms:.3f}"
        lines.append(f"| {row.method} | {row.error or f'{row.ms:.1f}'} | {ratio} | {row.peak_gib:.2f} |")
    return "\n".join(lines)


def installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORK, nargs="+", default=["4bit", "float8", "float8 f"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536])
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--chunks", type=int, nargs="*", default=[], help="chunk lengths (tokens) to try beside")
    parser.add_argument("--json", help="write the rows to this file, after every length")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.small else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    about = ", ".join([machine, f"torch {torch.__version__}", *map(installed, PACKAGES), str(datetime.date.today())])
    print(about)
    rows: list[Row] = []
    for name in args.work:
        for tokens in [96] if args.small else args.tokens:
            rows += run(name, tokens, args, device)
            print(table([row for row in rows if (row.work, row.tokens) == (name, tokens)]), flush=True)
            gc.collect()
            if args.json:
                save(args.json, about, rows)


if __name__ == "__main__":
    main()
