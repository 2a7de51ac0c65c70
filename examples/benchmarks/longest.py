"""The longest sequence that trains: all 32 layers of Llama-3-8B under 80 GB, the headline of the mini-sequence paper.

    python examples/benchmarks/longest.py                          # a GPU with 80 GB or more, a process for each method
    python examples/benchmarks/longest.py --cap 0                  # all that the card has
    python examples/benchmarks/longest.py --rates 16384 55296      # steps in turn, of all methods that fit there
    python examples/benchmarks/longest.py --layers 4 --lengths 524288    # 4 layers, and memory taken for the other 28
    python examples/benchmarks/longest.py --small --lengths 64     # anywhere: tiny shapes, these lengths only

As in the paper: batch 1, weights and AdamW's state in bfloat16, and the optimizer's step inside the backward, one hook
a parameter, so that no gradient outlives its layer. Layers are compiled one by one (they share the code), with their
checkpointing inside; norm, head and loss are compiled together. Weights are random. Attention is the same fused kernel
for all. The methods:

    eager            transformers' layers and head; the loss in float32, as its models compute it
    torch.compile    the same, compiled
    mst_fx           backend=mst_fx.backend
    + checkpointing  each decoder layer under activation checkpointing
    offload          offload="checkpoints": what these keep is in the host's memory meanwhile
    heads            head_groups=8: attention runs over one head of the keys after the other
    eager recipe     nothing compiled; inputs of layers in the host's memory, MLPs in tiles, the loss in chunks

A first trial, at --first tokens, compiles and makes the optimizer's state. Lengths then double up to half of the cap; a
line through the last two peaks says where the limit is, and lengths around it are tried until one has trained and the
next one (--grain tokens more) has not. At the longest one, two more steps are timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F  # noqa: N812
from eager_recipe import OnHost, sum_over_chunks, tiled_layer
from torch.utils.checkpoint import checkpoint
from train_lm import PRESETS, build_model
from transformers import PreTrainedModel

import mst_fx

LLAMA = replace(PRESETS["8b-layer"], layers=32)
TINY = replace(LLAMA, hidden=64, ffn=256, heads=4, kv_heads=2, vocab=512, layers=2, dtype=torch.float32)
METHODS = (
    "eager",
    "eager + checkpointing",
    "torch.compile",
    "torch.compile + checkpointing",
    "mst_fx + checkpointing",
    "mst_fx + checkpointing, offload",
    "mst_fx + checkpointing, heads",
    "mst_fx + checkpointing, heads, offload",
    "eager recipe",
)
HEAD_GROUPS = 8
MOST_TRIALS = 14
LAYER_CHUNK = 8192
"""Tokens of a mini-sequence of the MLPs: their gradients are summed half as often as with the 4,096 that mst_fx takes
where it does not know how long a sequence will be; over long ones the backward of attention needs more memory."""


@dataclass(frozen=True)
class Trial:
    """Training at one length; what is 0 was not reached."""

    tokens: int
    trained: bool
    peak_gib: float = 0.0
    seconds: float = 0.0
    loss: float = 0.0


def decoder_layer(layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = layer(x, attention_mask=None, position_embeddings=(cos, sin))
    return out[0] if isinstance(out, tuple) else out


def head_loss(model: PreTrainedModel, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model.lm_head(model.model.norm(x))
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.view(-1))


def loss_in_chunks(model: PreTrainedModel, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    def run(model: PreTrainedModel, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(model.model.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    return sum_over_chunks(run, model, x, labels) / (labels != -100).sum()


def checkpointed_layer(layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return checkpoint(decoder_layer, layer, x, cos, sin, use_reentrant=False)


def compiler_of(method: str, **options: Any) -> Callable[..., Any]:
    """What a method does to a function; mst_fx, with these options, loops all: the first length is a short one."""
    if method.startswith("eager"):
        return lambda fn: fn
    options = {"strict": True, "min_bytes": 0, "head_groups": HEAD_GROUPS if "heads" in method else 1, **options}
    options |= {"offload": "checkpoints"} if "offload" in method else {}
    how = {"backend": mst_fx.backend, "options": options} if method.startswith("mst_fx") else {}
    return lambda fn: torch.compile(fn, dynamic=True, fullgraph=True, **how)


def loss_of(
    model: PreTrainedModel, input_ids: torch.Tensor, run_layer: Callable[..., Any], run_head: Callable[..., Any]
) -> torch.Tensor:
    """The loss of the next tokens, by functions that run a layer and the head."""
    x = model.model.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    cos, sin = model.model.rotary_emb(x, positions)
    for layer in model.model.layers:
        x = run_layer(layer, x, cos, sin)
    return run_head(model, x, F.pad(input_ids[:, 1:], (0, 1), value=-100))


def make_step(model: PreTrainedModel, method: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A training step of one method; gives the loss."""
    if method == "eager recipe":
        run_layer, run_head = partial(OnHost.apply, tiled_layer), loss_in_chunks
    else:
        layer_of = checkpointed_layer if "checkpointing" in method else decoder_layer
        run_layer = compiler_of(method, chunk_tokens=LAYER_CHUNK)(layer_of)
        run_head = compiler_of(method)(head_loss)

    def step(input_ids: torch.Tensor) -> torch.Tensor:
        # A function of its own: the backward finds what autograd has saved, and no locals.
        loss = loss_of(model, input_ids, run_layer, run_head)
        loss.backward()
        return loss.detach()

    return step


def step_in_backward(model: PreTrainedModel) -> None:
    """Update each parameter as soon as its gradient is there, and drop the gradient."""
    for parameter in model.parameters():
        optimizer = torch.optim.AdamW([parameter], lr=1e-5, fused=True)

        def update(_: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)


def attempt(model: PreTrainedModel, step: Callable[[torch.Tensor], torch.Tensor], tokens: int, steps: int = 1) -> Trial:
    """Train for some steps; the last one is timed."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)
    torch._dynamo.maybe_mark_dynamic(input_ids, 1)
    try:
        for _ in range(steps):
            start = time.perf_counter()
            loss = step(input_ids).item()
            seconds = time.perf_counter() - start
    except torch.OutOfMemoryError:
        trial = Trial(tokens, trained=False)
    else:
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        trial = Trial(tokens, True, peak, seconds, loss)
    model.zero_grad()  # some gradients exist where the backward ran out of memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    print(trial, file=sys.stderr, flush=True)
    return trial


def search(run: Callable[[int], Trial], first: int, cap_gib: float, grain: int) -> list[Trial]:
    """Trials up to the longest length that trains, and one that does not.

    Args:
        run: trains at a length (tokens).
        first: a length that fits, and twice of it as well.
        cap_gib: of the device.
        grain: tokens between the lengths that are told apart.
    """
    trials = [run(first), run(2 * first)]
    while (each := slope(trials)) and trials[-1].peak_gib + each * trials[-1].tokens < cap_gib:
        trials.append(run(2 * trials[-1].tokens))
    good, bad = bounds(trials)
    guess = good + int((cap_gib - trials[-1].peak_gib) / each) if each else good
    stride = grain
    while len(trials) < MOST_TRIALS and (bad is None or bad - good > grain):
        guess = guess // grain * grain
        if not good < guess < (bad or guess + 1):
            guess = (good + bad) // 2 // grain * grain if bad else good + grain
        trials.append(run(guess))
        good, bad = bounds(trials)
        guess += stride if trials[-1].trained else -stride
        stride *= 2
    return trials


def bounds(trials: Sequence[Trial]) -> tuple[int, int | None]:
    """The longest length that trained, and the shortest that did not, if any."""
    failed = [trial.tokens for trial in trials if not trial.trained]
    return max(trial.tokens for trial in trials if trial.trained), min(failed, default=None)


def slope(trials: Sequence[Trial]) -> float:
    """GiB a token between the last two trials; 0 where one of them did not train."""
    before, last = trials[-2:]
    return (last.peak_gib - before.peak_gib) / (last.tokens - before.tokens) if last.trained else 0.0


def capped_model(args: argparse.Namespace) -> tuple[PreTrainedModel, float]:
    """The model, its optimizer in its hooks, and how many GiB of the device may be used."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = replace(TINY if args.small else LLAMA, length=2**18)
    model = build_model(replace(preset, layers=args.layers or preset.layers), device).train()
    step_in_backward(model)
    if device.type != "cuda":
        return model, 0.0
    of_a_layer = 3 * sum(x.numel() * x.itemsize for x in model.model.layers[0].parameters())  # with AdamW's state
    model.others = torch.empty((preset.layers - len(model.model.layers)) * of_a_layer, dtype=torch.uint8, device=device)
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * 1e9 / whole) if args.cap else 1.0)
    return model, min(whole, args.cap * 1e9 or whole) / 2**30


def rates(args: argparse.Namespace) -> None:
    """Methods in one process, taking turns of one step: a table of medians, ratios to the first one that trains."""
    model, _ = capped_model(args)
    steps = {method: make_step(model, method) for method in args.methods}
    print("| tokens | method | s a step | ratio | tokens/s | peak GiB |\n|---|---|---|---|---|---|")
    for tokens in args.rates:
        fit = {method: step for method, step in steps.items() if attempt(model, step, tokens).trained}
        turns = [{method: attempt(model, step, tokens) for method, step in fit.items()} for _ in range(args.rounds)]
        seconds = {method: statistics.median(turn[method].seconds for turn in turns) for method in fit}
        for method, each in seconds.items():
            ratio, peak = each / next(iter(seconds.values())), turns[-1][method].peak_gib
            print(f"| {tokens:,} | {method} | {each:.2f} | {ratio:.3f} | {tokens / each:,.0f} | {peak:.1f} |")


def run_here(args: argparse.Namespace) -> list[Trial]:
    """All trials of one method, in this process."""
    model, cap_gib = capped_model(args)
    step = make_step(model, args.here)
    if args.lengths:
        return [attempt(model, step, tokens, steps=1 if i else 2) for i, tokens in enumerate(args.lengths)]
    trials = search(lambda tokens: attempt(model, step, tokens), args.first, cap_gib, args.grain)
    return [*trials, attempt(model, step, bounds(trials)[0], steps=2)]


def run_apart(method: str, arguments: Sequence[str]) -> list[Trial]:
    """The same in a process of its own, so that no method finds the memory of another."""
    command = [sys.executable, __file__, "--here", method, *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Trial(**entry) for entry in json.loads(run.stdout.splitlines()[-1])]


def row(method: str, trials: Sequence[Trial]) -> str:
    longest, failed = bounds(trials)
    best = next(trial for trial in reversed(trials) if trial.tokens == longest)
    rate = best.tokens / best.seconds
    limit = f"{failed:,}" if failed else "-"
    return f"| {method} | {best.tokens:,} | {limit} | {best.peak_gib:.1f} | {rate:,.0f} | {best.loss:.6f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--layers", type=int, help="so many, and memory taken for the weights and states of the others")
    parser.add_argument("--cap", type=float, default=80.0, help="GB of the device that may be used; 0 for all")
    parser.add_argument("--first", type=int, default=1024, help="tokens to begin with")
    parser.add_argument("--grain", type=int, default=512, help="tokens between the lengths that are told apart")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="try these (tokens; the first one twice), search for none"
    )
    parser.add_argument("--rates", type=int, nargs="+", metavar="TOKENS", help="compare the methods at these lengths")
    parser.add_argument("--rounds", type=int, default=3, help="of --rates: turns of each method")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--here", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps([asdict(trial) for trial in run_here(args)]))
        return
    if args.rates:
        return rates(args)
    passed = [f"--cap={args.cap}", f"--first={args.first}", f"--grain={args.grain}"]
    passed += [f"--layers={args.layers}"] if args.layers else []
    passed += ["--small"] * args.small + (["--lengths", *map(str, args.lengths)] if args.lengths else [])
    print("| method | longest (tokens) | does not train | peak GiB | tokens/s | loss |\n|---|---|---|---|---|---|")
    for method in args.methods:
        print(row(method, run_apart(method, passed)), flush=True)


if __name__ == "__main__":
    main()
