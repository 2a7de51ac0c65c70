"""Memory against time, by sequence length and chunk length: one training step of layers and the head of Llama-3-8B.

    python examples/benchmarks/tradeoff.py --json rows.json                       # a GPU: measure two layers
    python examples/benchmarks/tradeoff.py --from rows.json --plot tradeoff.png   # show what was measured
    python examples/benchmarks/tradeoff.py --varying                              # a GPU: lengths that vary
    python examples/benchmarks/tradeoff.py --small                                # anywhere: tiny shapes, in float32

A step is forward and backward of transformers' LlamaForCausalLM, random weights, batch 1, no optimizer. The methods:

    plain          torch.compile
    checkpointing  torch.compile, each decoder layer under activation checkpointing
    mst_fx         backend=mst_fx.backend, as planned and with the chunk lengths of --chunks
    both           mst_fx and checkpointing

With --varying the methods are plain and mst_fx, each compiled for this one length and once for any, by default at one
short length and two long ones: what a loop costs whose length is found at run time, and what one costs a short batch.
On an H100 that takes about two minutes, of which a half is compiling.

All methods of one length are compiled and warmed up, then take turns of about a second in random order (`turns.py`).
Times are medians. "Peak" is memory above the weights in one step, gradients included; "predicted" is what mst_fx
expects it to be. --json is written after every length; several such files, of a few lengths each, may follow --from.
Prints a Markdown table; ratios are of times, to plain, or to checkpointing where plain runs out of memory.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tradeoff_rows import METHODS, Row, lengths_of, load_newest, named, predicted
from train_lm import PRESETS, build_model, peak_bytes
from transformers import PreTrainedModel
from turns import add_time, attempt, save, take_turns

import mst_fx

Step = Callable[[torch.Tensor], None]
Key = tuple[str, int | None]  # method and chunk length
LLAMA = PRESETS["8b-layer"]
TINY = replace(LLAMA, hidden=64, ffn=256, heads=4, kv_heads=2, vocab=512)


def make_step(model: PreTrainedModel, *, varying: bool = False, **how: Any) -> Step:
    def loss_fn(input_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=input_ids, labels=input_ids).loss

    compiled = torch.compile(loss_fn, dynamic=None if varying else False, **how)
    marked: dict[int, torch.Tensor] = {}  # by length: the other methods take tensors without a mark

    def step(input_ids: torch.Tensor) -> None:
        if varying and input_ids.shape[1] not in marked:
            marked[input_ids.shape[1]] = input_ids.clone()
            torch._dynamo.mark_dynamic(marked[input_ids.shape[1]], 1)
        try:
            compiled(marked.get(input_ids.shape[1], input_ids)).backward()
        finally:  # some gradients exist where backward runs out of memory
            model.zero_grad()

    return step


def make_varying_steps(model: PreTrainedModel, options: dict[str, Any]) -> dict[Key, Step]:
    """The methods without checkpointing, each for one length and for any."""
    with_loops: dict[str, Any] = {"backend": mst_fx.backend, "options": options}
    return {
        (f"{method}{', any length' if varying else ''}", None): make_step(model, varying=varying, **how)
        for method, how in (("plain", {}), ("mst_fx", with_loops))
        for varying in (False, True)
    }


def make_steps(
    model: PreTrainedModel, checkpointed: PreTrainedModel, chunks: Sequence[int], options: dict[str, Any]
) -> dict[Key, Step]:
    steps: dict[Key, Step] = {("plain", None): make_step(model), ("checkpointing", None): make_step(checkpointed)}
    for method, looped in (("mst_fx", model), ("both", checkpointed)):
        for chunk in (None, *chunks):
            given = options if chunk is None else {**options, "chunk_tokens": chunk}
            steps[method, chunk] = make_step(looped, backend=mst_fx.backend, options=given)
    return steps


def with_checkpointing(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of the same weights, so that no flag has to change between the turns."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return twin.train()


def measure(steps: dict[Key, Step], input_ids: torch.Tensor, rounds: int, weights: int) -> list[Row]:
    """Warm every method up and read its peak alone, then time all of them in turn; weights are in bytes."""
    rows: dict[Key, Row] = {}
    for key, step in steps.items():
        begin = partial(warm_up, step=step, input_ids=input_ids, weights=weights)
        rows[key] = attempt(Row(input_ids.numel(), *key), begin)
    turns = {
        key: partial(add_time, step=partial(step, input_ids), device=input_ids.device) for key, step in steps.items()
    }
    return list(take_turns(rows, turns, rounds).values())


def warm_up(row: Row, step: Step, input_ids: torch.Tensor, weights: int) -> Row:
    """Compile, read what was planned, and measure the peak."""
    known = len(mst_fx.reports())
    step(input_ids)
    reports = mst_fx.reports()[known:]
    step(input_ids)
    gc.collect()
    return replace(
        row,
        chosen=chunks_of(reports),
        peak_gib=peak_bytes(step, input_ids) / 2**30,
        predicted_gib=(max((report.peak for report in reports), default=0) - weights) / 2**30,
        unlooped_gib=(max((report.peak_whole for report in reports), default=0) - weights) / 2**30,
    )


def chunks_of(reports: Sequence[mst_fx.Report]) -> str:
    """For example "gated_mlp x2, head x17", or "gated_mlp x1 (small)" where it is left alone; equal layers once."""
    looped = {f"{region.pattern} x{region.chunks}" for report in reports for region in report.regions}
    whole = {f"{left.pattern} x1 ({left.reason.lower()})" for report in reports for left in report.refusals}
    return ", ".join(sorted(looped | whole))


def table(rows: Sequence[Row]) -> str:
    lines = ["| tokens | method | ms | ratio | peak GiB | predicted | chunks |", "|---|---|---|---|---|---|---|"]
    for tokens in lengths_of(rows):
        mine = [row for row in rows if row.tokens == tokens]
        bases = [row for row in mine if row.method in ("plain", "checkpointing") and not row.error]
        for row in mine:
            ratio = f"{row.ms / bases[0].ms:.3f}" if bases and not row.error else "-"
            numbers = f"{row.error} | - | -" if row.error else f"{row.ms:,.1f} | {ratio} | {short(row.peak_gib)}"
            first, guess = f"{tokens:,}" if row is mine[0] else "", short(predicted(row, rows))
            lines.append(f"| {first} | {named(row)} | {numbers} | {guess} | {row.chosen} |")
    return "\n".join(lines)


def short(gib: float) -> str:
    return f"{gib:.2f}" if gib > 0.1 else f"{gib:.2g}"


def parse() -> argparse.Namespace:
    """The command line, with lengths and chunks that fit the shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--varying", action="store_true", help="compile for any length, too; nothing is checkpointed")
    parser.add_argument("--layers", type=int, help="2, or 1 with --varying")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; with --from: of those in the files")
    parser.add_argument("--chunks", type=int, nargs="*", help="chunk lengths (tokens) to try beside the plan's")
    parser.add_argument("--accumulate", choices=["float32", "native"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--from", nargs="+", dest="sources", metavar="FILE", help="read rows in place of measuring")
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args()
    if args.layers is None:
        args.layers = 1 if args.varying else 2
    if args.lengths is None and not args.sources:
        long = [512, 16384, 32768] if args.varying else [2**i for i in range(9, 18)]
        args.lengths = [64, 128] if args.small else long
    if args.chunks is None:
        args.chunks = [16, 32] if args.small else [512, 2048, 8192]
    return args


def run(args: argparse.Namespace) -> tuple[str, list[Row]]:
    """Measure length after length; `--json` holds all that are done."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and not args.small else torch.float32
    torch._dynamo.config.recompile_limit = 64  # one function, many backends
    preset = replace(TINY if args.small else LLAMA, layers=args.layers, length=max(args.lengths), dtype=dtype)
    model = build_model(preset, device).train()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    options = {"strict": True, "accumulate": args.accumulate, **({"min_bytes": 0} if args.small else {})}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    how = [f"{name} {version(name)}" for name in ("torch", "transformers", "mst_fx")]
    how += [str(datetime.date.today()), str(dtype), f"accumulate={args.accumulate}", f"{args.layers} layer(s)"]
    how.append(f"median of {args.rounds}")
    about = ", ".join([machine, *how])
    rows: list[Row] = []
    checkpointed = None if args.varying else with_checkpointing(model)
    steps = make_varying_steps(model, options) if args.varying else {}
    for tokens in args.lengths:
        input_ids = torch.randint(preset.vocab, (1, tokens), device=device)
        if checkpointed is not None:
            torch._dynamo.reset()
            steps = make_steps(model, checkpointed, [chunk for chunk in args.chunks if chunk < tokens], options)
        rows += measure(steps, input_ids, args.rounds, weights)
        print(f"{tokens} tokens measured", file=sys.stderr, flush=True)
        if args.json:
            save(args.json, about, rows)
    return about, rows


def main() -> None:
    args = parse()
    about, rows = load_newest(args.sources) if args.sources else run(args)
    rows = [row for row in rows if not args.lengths or row.tokens in args.lengths]
    rows.sort(key=lambda row: (row.tokens, METHODS.index(row.method), row.chunk or 0))
    print(f"{about}\n\n{table(rows)}")
    if args.plot:
        from tradeoff_plot import plot

        plot(rows, args.plot)


if __name__ == "__main__":
    main()
