"""Memory against time, by sequence length and chunk length: one training step of two layers and the head of Llama-3-8B.

    python examples/benchmarks/tradeoff.py --json rows.json                       # a GPU: measure
    python examples/benchmarks/tradeoff.py --from rows.json --plot tradeoff.png   # show what was measured
    python examples/benchmarks/tradeoff.py --small                                # anywhere: tiny shapes, in float32

A step is forward and backward of transformers' LlamaForCausalLM, random weights, batch 1, no optimizer. The methods:

    plain          torch.compile
    checkpointing  torch.compile, each decoder layer under activation checkpointing
    mst_fx         backend=mst_fx.backend, as planned and with the chunk lengths of --chunks
    both           mst_fx and checkpointing

All methods of one length are compiled and warmed up, then take turns: an untimed step, so that clocks have followed the
method itself, and a timed one. Times are medians. "Peak" is memory above the weights in one step, gradients included.
--json is written after every length; several such files, of a few lengths each, may follow --from. Prints a Markdown
table; ratios are of times, to plain, or to checkpointing where plain runs out of memory.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from train_lm import PRESETS, build_model, peak_bytes
from transformers import PreTrainedModel

import mst_fx

Step = Callable[[torch.Tensor], None]
Key = tuple[str, int | None]  # method and chunk length
LLAMA = replace(PRESETS["8b-layer"], layers=2)
TINY = replace(LLAMA, hidden=64, ffn=256, heads=4, kv_heads=2, vocab=512)
LOOKS = {  # marker and colour
    "plain": ("o", "#555555"),
    "checkpointing": ("s", "#d55e00"),
    "mst_fx": ("D", "#0072b2"),
    "both": ("^", "#009e73"),
}
STAR = {"marker": "*", "markersize": 12, "markeredgecolor": "black", "markeredgewidth": 0.6}
PANELS = 6


@dataclass(frozen=True)
class Row:
    """One method at one length.

    Attributes:
        chunk: length of the mini-sequences that was asked for; None where there is none, or the plan chooses.
        chosen: number of mini-sequences of each pattern, and what was left alone.
        error: what there is in place of numbers.
    """

    tokens: int
    method: str
    chunk: int | None
    times_ms: tuple[float, ...] = ()
    peak_gib: float = 0.0
    chosen: str = ""
    error: str = ""

    @property
    def ms(self) -> float:
        """Of a typical step."""
        return statistics.median(self.times_ms)


def make_step(model: PreTrainedModel, **how: Any) -> Step:
    def loss_fn(input_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=input_ids, labels=input_ids).loss

    compiled = torch.compile(loss_fn, dynamic=False, **how)

    def step(input_ids: torch.Tensor) -> None:
        try:
            compiled(input_ids).backward()
        finally:  # some gradients exist where backward runs out of memory
            model.zero_grad()

    return step


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


def measure(tokens: int, steps: dict[Key, Step], input_ids: torch.Tensor, rounds: int) -> list[Row]:
    """Warm every method up and read its peak alone, then time all of them in turn."""
    rows = {key: attempt(Row(tokens, *key), warm_up, step, input_ids) for key, step in steps.items()}
    for _ in range(rounds):
        for key, row in rows.items():
            if not row.error:
                rows[key] = attempt(row, add_time, steps[key], input_ids)
    return list(rows.values())


def attempt(row: Row, act: Callable[[Row, Step, torch.Tensor], Row], step: Step, input_ids: torch.Tensor) -> Row:
    """The row that `act` makes of this one, or one with the error, which is a result as well."""
    try:
        return act(row, step, input_ids)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:100]}".splitlines()[0]
        text = "out of memory" if "out of memory" in str(error) else text
    gc.collect()  # not above: until the handler ends, the traceback holds what the step had made
    torch.cuda.empty_cache()
    return Row(row.tokens, row.method, row.chunk, chosen=row.chosen, error=text)


def warm_up(row: Row, step: Step, input_ids: torch.Tensor) -> Row:
    """Compile, read what was planned, and measure the peak."""
    known = len(mst_fx.reports())
    step(input_ids)
    chosen = chunks_of(mst_fx.reports()[known:])
    step(input_ids)
    gc.collect()
    return replace(row, chosen=chosen, peak_gib=peak_bytes(step, input_ids) / 2**30)


def add_time(row: Row, step: Step, input_ids: torch.Tensor) -> Row:
    step(input_ids)
    return replace(row, times_ms=(*row.times_ms, time_of(step, input_ids)))


def time_of(step: Step, input_ids: torch.Tensor) -> float:
    """Milliseconds of one step."""
    if not input_ids.is_cuda:
        start = time.perf_counter()
        step(input_ids)
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step(input_ids)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def chunks_of(reports: Sequence[mst_fx.Report]) -> str:
    """For example "gated_mlp x2, head x17", or "gated_mlp x1 (small)" where it is left alone; equal layers once."""
    looped = {f"{region.pattern} x{region.chunks}" for report in reports for region in report.regions}
    whole = {f"{left.pattern} x1 ({left.reason.lower()})" for report in reports for left in report.refusals}
    return ", ".join(sorted(looped | whole))


def table(rows: Sequence[Row]) -> str:
    lines = ["| tokens | method | ms | ratio | peak GiB | chunks |", "|---|---|---|---|---|---|"]
    for tokens in lengths_of(rows):
        mine = [row for row in rows if row.tokens == tokens]
        bases = [row for row in mine if row.method in ("plain", "checkpointing") and not row.error]
        for row in mine:
            ratio = f"{row.ms / bases[0].ms:.3f}" if bases and not row.error else "-"
            peak = f"{row.peak_gib:.2f}" if row.peak_gib > 0.1 else f"{row.peak_gib:.2g}"
            numbers = f"{row.error} | - | -" if row.error else f"{row.ms:,.1f} | {ratio} | {peak}"
            lines.append(f"| {f'{tokens:,}' if row is mine[0] else ''} | {named(row)} | {numbers} | {row.chosen} |")
    return "\n".join(lines)


def named(row: Row) -> str:
    return row.method if row.chunk is None else f"{row.method}, chunks of {row.chunk:,}"


def lengths_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row.tokens for row in rows})


def plot(rows: Sequence[Row], path: str) -> None:
    """One panel a length; at most PANELS, from the shortest to the longest."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lengths = lengths_of([row for row in rows if not row.error])
    count = min(PANELS, len(lengths))
    columns, lines = min(3, count), -(-count // 3)
    figure = Figure(figsize=(9, 1 + 2.5 * lines), dpi=200, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels[count:]:
        axes.set_axis_off()
    for i, axes in enumerate(panels[:count]):
        tokens = lengths[round(i * (len(lengths) - 1) / max(1, count - 1))]
        draw(axes, [row for row in rows if row.tokens == tokens])
    scale(panels[:count])
    handles = [Line2D([], [], marker=m, color=c, linewidth=0, label=name) for name, (m, c) in LOOKS.items()]
    handles.append(Line2D([], [], linewidth=0, label="the planner's own choice", **{**STAR, "color": "white"}))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8.5, frameon=False)
    figure.supxlabel("peak GiB of a step above the weights (small numbers: chunk length in tokens)", fontsize=9)
    figure.supylabel("ms per 1,000 tokens", fontsize=9)
    figure.savefig(path)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Chunk lengths of one method on a line, the planner's own as a star; what has no numbers is named."""
    for method, (marker, colour) in LOOKS.items():
        mine = [row for row in rows if row.method == method and not row.error]
        points = {row.chunk: (row.peak_gib, row.ms / row.tokens * 1000) for row in mine}
        if method in ("mst_fx", "both") and None in points:
            axes.plot(*points.pop(None), linewidth=0, color=colour, **STAR)
        axes.plot(*zip(*points.values(), strict=True), marker=marker, color=colour, linewidth=0.8, markersize=5)
        for chunk, point in points.items():
            text = f"{chunk:,}" if chunk else ""
            axes.annotate(text, point, xytext=(4, 3), textcoords="offset points", fontsize=6.5, color=colour)
    missing = "\n".join(f"{named(row)}: {row.error[:30]}" for row in rows if row.error)
    axes.text(0.03, 0.03, missing, transform=axes.transAxes, fontsize=6.5, color="#555555")
    axes.set_title(f"{rows[0].tokens:,} tokens", fontsize=9)
    axes.grid(color="#eeeeee")
    axes.tick_params(labelsize=7.5)


def scale(panels: Sequence[Any]) -> None:
    """Logarithmic axes on which a ratio is the same distance in every panel, so that none of them magnifies noise."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    for name in "xy":
        ends = [getattr(axes.dataLim, f"interval{name}").tolist() for axes in panels]
        half = 1.15 * sqrt(max(1.2, *(high / low for low, high in ends)))
        for axes, (low, high) in zip(panels, ends, strict=True):
            middle = sqrt(low * high)
            axes.set(**{f"{name}scale": "log", f"{name}lim": (middle / half, middle * half)})
            axis = getattr(axes, f"{name}axis")
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)) if half > 2 else MaxNLocator(5))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(ScalarFormatter())


def load(paths: Sequence[str]) -> tuple[str, list[Row]]:
    """What the files say of their runs, and their rows; of a length that several hold, those of the last one.

    Times of different runs do not mix: only what took turns can be compared.
    """
    read = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    newest: dict[int, list[Row]] = {}
    for file in read:
        rows = [Row(**{**entry, "times_ms": tuple(entry["times_ms"])}) for entry in file["rows"]]
        newest |= {tokens: [row for row in rows if row.tokens == tokens] for tokens in lengths_of(rows)}
    return "\n".join(dict.fromkeys(file["about"] for file in read)), [row for rows in newest.values() for row in rows]


def parse() -> argparse.Namespace:
    """The command line, with lengths and chunks that fit the shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; with --from: of those in the files")
    parser.add_argument("--chunks", type=int, nargs="*", help="chunk lengths (tokens) to try beside the plan's")
    parser.add_argument("--accumulate", choices=["float32", "native"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--from", nargs="+", dest="sources", metavar="FILE", help="read rows in place of measuring")
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args()
    if args.lengths is None and not args.sources:
        args.lengths = [64, 128] if args.small else [2**i for i in range(9, 18)]
    if args.chunks is None:
        args.chunks = [16, 32] if args.small else [512, 2048, 8192]
    return args


def run(args: argparse.Namespace) -> tuple[str, list[Row]]:
    """Measure length after length; `--json` holds all that are done."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and not args.small else torch.float32
    torch._dynamo.config.recompile_limit = 64  # one function, many backends
    preset = replace(TINY if args.small else LLAMA, length=max(args.lengths), dtype=dtype)
    model = build_model(preset, device).train()
    checkpointed = with_checkpointing(model)
    options = {"strict": True, "accumulate": args.accumulate, **({"min_bytes": 0} if args.small else {})}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    how = [f"{name} {version(name)}" for name in ("torch", "transformers", "mst_fx")]
    how += [str(datetime.date.today()), str(dtype), f"accumulate={args.accumulate}", f"median of {args.rounds}"]
    about = ", ".join([machine, *how])
    rows: list[Row] = []
    for tokens in args.lengths:
        torch._dynamo.reset()
        input_ids = torch.randint(preset.vocab, (1, tokens), device=device)
        steps = make_steps(model, checkpointed, [chunk for chunk in args.chunks if chunk < tokens], options)
        rows += measure(tokens, steps, input_ids, args.rounds)
        print(f"{tokens} tokens measured", file=sys.stderr, flush=True)
        if args.json:
            whole = {"about": about, "rows": [asdict(row) for row in rows]}
            Path(args.json).write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return about, rows


def main() -> None:
    args = parse()
    about, rows = load(args.sources) if args.sources else run(args)
    rows = [row for row in rows if not args.lengths or row.tokens in args.lengths]
    rows.sort(key=lambda row: (row.tokens, list(LOOKS).index(row.method), row.chunk or 0))
    print(f"{about}\n\n{table(rows)}")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
