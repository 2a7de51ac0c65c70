"""TRL's SFTTrainer on one GPU: tokens a second and peak memory, as TRL runs it, with Liger, and with mst_fx.

    python examples/benchmarks/trl_sft.py                        # a GPU with 80 GB: both lengths, about twelve minutes
    python examples/benchmarks/trl_sft.py --methods torch.compile "mst_fx + model's loss"    # two more methods
    python examples/benchmarks/trl_sft.py --small --methods TRL mst_fx    # tiny shapes, anywhere

A model of Qwen3-1.7B's shapes with random weights in bfloat16 is trained with AdamW on random tokens, batch 1. The rest
are TRL's defaults, with checkpointing, which TRL has on, and without. The methods:

    TRL                      as it is: layers run eager, the head in TRL's own tiles
    TRL + Liger              use_liger_kernel=True: Liger's norm, MLP and rotary kernels; the head in TRL's tiles
    torch.compile            torch_compile=True
    mst_fx                   the same after mst_fx.enable()
    mst_fx + model's loss    the same, and compute_loss = Trainer.compute_loss, so that mst_fx loops the head

Attention is one call of torch's causal kernel in all of them: compiled, transformers' "sdpa" builds a mask of length x
length from the attention mask that TRL passes. Each method runs in a process of its own, with and without checkpointing
in two, one length after the other. Peaks are those of the allocator, weights and optimizer included, over all steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trainers"))

import tiny
import torch
import train_lm  # noqa: F401 - registers the attention "causal_sdpa"
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

import mst_fx

SHAPES = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
SMALL = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 512}
METHODS = ("TRL", "TRL + Liger", "torch.compile", "mst_fx", "mst_fx + model's loss")
DEFAULT = ("TRL", "TRL + Liger", "mst_fx")
WARM_UP, MEASURED = 2, 3
GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Row:
    """One method at one length.

    Attributes:
        method, checkpointing, tokens: what was run.
        rate: tokens a second, of the measured steps; 0 where it did not run.
        peak_gib: peak of the allocator, weights and optimizer included.
        loss: mean of all steps.
        looped: regions that mst_fx looped, by pattern.
        device: that it ran on.
        failed: why it did not run, "" where it did.
    """

    method: str
    checkpointing: bool
    tokens: int
    rate: float = 0.0
    peak_gib: float = 0.0
    loss: float = 0.0
    looped: dict[str, int] | None = None
    device: str = ""
    failed: str = ""

    def __str__(self) -> str:
        name = f"{self.method} + checkpointing" if self.checkpointing else self.method
        if self.failed:
            return f"| {self.tokens:,} | {name} | {self.failed} | | |"
        return f"| {self.tokens:,} | {name} | {self.rate:,.0f} | {self.peak_gib:.1f} | {self.loss:.4f} |"


class Clock(TrainerCallback):
    """Notes the time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **state: Any) -> None:
        """Wait for the device and note the time."""
        if GPU:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


class WithModelsLoss(SFTTrainer):
    """An SFTTrainer that takes the loss which the model computes."""

    compute_loss = Trainer.compute_loss


def build_model(small: bool) -> PreTrainedModel:
    config = Qwen3Config(**{**SHAPES, **(SMALL if small else {})}, use_cache=False, attn_implementation="causal_sdpa")
    torch.manual_seed(0)
    with torch.device("cuda" if GPU else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if GPU else torch.float32)


def random_rows(vocab: int, tokens: int) -> Dataset:
    """Rows of random tokens, one a step."""
    ids = torch.randint(vocab, (WARM_UP + MEASURED, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def build_trainer(method: str, checkpointing: bool, tokens: int, small: bool, clock: Clock) -> SFTTrainer:
    model = build_model(small)
    config = SFTConfig(
        tiny.folder(),
        per_device_train_batch_size=1,
        max_steps=WARM_UP + MEASURED,
        max_length=None,
        gradient_checkpointing=checkpointing,
        use_liger_kernel="Liger" in method,
        torch_compile=method == "torch.compile" or "mst_fx" in method,
        bf16=GPU,
        use_cpu=not GPU,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    kind = WithModelsLoss if "loss" in method else SFTTrainer
    data = random_rows(model.config.vocab_size, tokens)
    words = tiny.tokenizer()
    return kind(model=model, args=config, train_dataset=data, processing_class=words, callbacks=[clock])


def measured(method: str, checkpointing: bool, tokens: int, small: bool) -> Row:
    """Train for a few steps."""
    known = len(mst_fx.reports())
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    try:
        trainer = build_trainer(method, checkpointing, tokens, small, clock)
        result = trainer.train()
    except torch.OutOfMemoryError:
        return Row(method, checkpointing, tokens, failed="does not fit")
    rate = MEASURED * tokens / (clock.times[-1] - clock.times[WARM_UP - 1])
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0
    regions = [region.pattern for report in mst_fx.reports()[known:] for region in report.regions]
    device = torch.cuda.get_device_name() if GPU else "CPU"
    return Row(method, checkpointing, tokens, rate, peak, result.training_loss, dict(Counter(regions)), device)


def run_here(args: argparse.Namespace) -> None:
    """All lengths of one method, in this process; a line of JSON for each."""
    if "mst_fx" in args.here:
        returned = {"returned_logits": "drop"} if "loss" in args.here else {}
        mst_fx.enable(**({"min_bytes": 0} if args.small else {}), **returned)
    fits = True
    for tokens in args.lengths:
        row = Row(args.here, args.checkpointing, tokens, failed="does not fit")
        row = measured(args.here, args.checkpointing, tokens, args.small) if fits else row
        fits = not row.failed
        print(json.dumps(asdict(row)), flush=True)
        torch.compiler.reset()
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
    for report in mst_fx.reports():
        print(report, file=sys.stderr)


def run_apart(method: str, checkpointing: bool, args: argparse.Namespace) -> list[Row]:
    """The same in a process of its own, so that no method finds the memory of another."""
    command = [sys.executable, __file__, "--here", method, "--lengths", *map(str, args.lengths)]
    command += ["--checkpointing"] * checkpointing + ["--small"] * args.small
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        try:
            out, told = run.communicate(timeout=args.limit)
        except subprocess.TimeoutExpired:
            run.kill()
            out, told = run.communicate()
            told += f"\nmore than {args.limit} s"
    rows = [Row(**json.loads(line)) for line in out.splitlines() if line.startswith('{"method"')]
    if args.log:
        with open(args.log, "a") as file:
            file.write(f"## {method}, checkpointing {checkpointing}\n{told}\n")
    if len(rows) < len(args.lengths):
        why = f"failed: {(told.strip().splitlines() or ['no error was printed'])[-1][:200]}"
        rows += [Row(method, checkpointing, tokens, failed=why) for tokens in args.lengths[len(rows) :]]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="16384 and 32768, tiny ones if small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one process, all lengths")
    parser.add_argument("--json", help="append each row to this file, a line of JSON each")
    parser.add_argument("--log", help="append what each process writes to stderr to this file, reports of mst_fx too")
    parser.add_argument("--here", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.lengths = args.lengths or ([64, 128] if args.small else [16384, 32768])
    if args.here:
        return run_here(args)
    used = ("torch", "transformers", "trl", "accelerate")
    print(*(f"{name} {version(name)}" for name in used), sep=", ")
    print("| tokens | method | tokens/s | peak GiB | mean loss |\n|---|---|---|---|---|")
    for method in args.methods:
        for checkpointing in (True, False):
            for row in run_apart(method, checkpointing, args):
                print(row, flush=True)
                if args.json:
                    with open(args.json, "a") as file:
                        file.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
