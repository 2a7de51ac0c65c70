"""Train a small Llama twice, with plain torch.compile and with backend="mst_fx": same losses, less memory.

    python examples/train_lm.py                          # a CPU will do: about a minute
    python examples/train_lm.py --device cuda --preset 8b-layer    # one layer of Llama-3-8B, 16,384 tokens, bf16

The model starts from random weights and learns the bytes of Python's own standard library, so nothing is downloaded.
What is compiled is the user's own function of the unchanged Hugging Face model; the optimizer stays outside. Both runs
have the same seed and see the same batches, step by step in turn. At the end: a table of both, the largest difference
between their losses, and what mst_fx looped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

import mst_fx

SEED = 0
COMPILING_STEPS = 2  # a recompile, if any, comes in the second step
LAST_STEPS = 10


@dataclass(frozen=True)
class Preset:
    """A model, its batches, and the options of mst_fx that fit its size."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    layers: int
    length: int
    batch: int
    steps: int
    rate: float
    dtype: torch.dtype
    min_bytes: int | None = None
    chunk_tokens: int | None = None


PRESETS = {
    # The defaults of mst_fx leave regions of this size alone.
    "small": Preset(128, 1024, 4, 2, 256, 2, 2048, 1, 50, 3e-3, torch.float32, min_bytes=0, chunk_tokens=256),
    "8b-layer": Preset(4096, 14336, 32, 8, 128256, 1, 16384, 1, 20, 1e-4, torch.bfloat16),
}


@dataclass(frozen=True)
class Row:
    """The columns of the table for one run."""

    loss: float
    step_ms: float
    state_mib: float
    peak_mib: float


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **ignored: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention without a mask; the stock one builds a length x length mask when it is compiled."""
    out = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


ATTENTION = "causal_sdpa"
AttentionInterface.register(ATTENTION, causal_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def build_model(preset: Preset, device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=preset.hidden,
        intermediate_size=preset.ffn,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        vocab_size=preset.vocab,
        num_hidden_layers=preset.layers,
        max_position_embeddings=preset.length,
        use_cache=False,
        attn_implementation=ATTENTION,
    )
    torch.manual_seed(SEED)
    with device:  # make the weights of a large preset on the device that uses them
        return AutoModelForCausalLM.from_config(config, dtype=preset.dtype)


def read_text() -> torch.Tensor:
    """Return the source text of the standard library's modules, as one element for each byte."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def batches(text: torch.Tensor, preset: Preset, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield random excerpts without end, the same in every run."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        starts = torch.randint(len(text) - preset.length, (preset.batch,), generator=generator)
        yield torch.stack([text[start : start + preset.length] for start in starts.tolist()]).long().to(device)


class Trainer:
    """One of the two runs: a model from the seed, its optimizer, and the compiled function.

    Attributes:
        losses: of all steps.
        seconds: of all steps.
    """

    def __init__(self, preset: Preset, device: torch.device, **how: Any) -> None:
        self.model = model = build_model(preset, device)
        # The fused step makes no copies of the weights, so that the peak is that of forward and backward.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=preset.rate, betas=(0.9, 0.95), fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []

        def loss_fn(input_ids: torch.Tensor) -> torch.Tensor:
            return model(input_ids=input_ids, labels=input_ids).loss

        self.loss_fn = torch.compile(loss_fn, **how)

    def step(self, input_ids: torch.Tensor) -> None:
        """Run forward, backward and update; record the loss and the time."""
        begin = time.perf_counter()
        loss = self.loss_fn(input_ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - begin)

    def row(self, input_ids: torch.Tensor) -> Row:
        """Return the results; this takes one more step, to measure its memory."""
        median = statistics.median(self.seconds[COMPILING_STEPS:])
        last = self.losses[-LAST_STEPS:]
        return Row(
            loss=statistics.mean(last),
            step_ms=median * 1e3,
            state_mib=state_bytes(self.model, self.optimizer) / 2**20,
            peak_mib=peak_bytes(self.step, input_ids) / 2**20,
        )


def train(plain: Trainer, looped: Trainer, data: Iterator[torch.Tensor], steps: int) -> None:
    """Let both runs take every step in turn, so that other load on the machine slows both alike."""
    with tqdm(total=steps, unit="step") as bar:
        for step in range(steps):
            bar.set_description("compiling" if step < COMPILING_STEPS else "training")
            input_ids = next(data)
            plain.step(input_ids)
            looped.step(input_ids)
            bar.set_postfix(plain=f"{plain.losses[-1]:.3f}", mst_fx=f"{looped.losses[-1]:.3f}", refresh=False)
            bar.update()


def state_bytes(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes that stay between steps: the weights and the optimizer's moments."""
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *moments])


def peak_bytes(step: Callable[[torch.Tensor], None], input_ids: torch.Tensor) -> int:
    """Return the peak bytes of one step above those before it: activations, temporaries and gradients."""
    if input_ids.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(input_ids)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(input_ids)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()  # negative where memory is freed
        peak = max(peak, alive)
    return peak


def table(plain: Row, looped: Row) -> str:
    rows = [
        (f"loss, mean of last {LAST_STEPS} steps", plain.loss, looped.loss, ".4f"),
        ("step, ms (median)", plain.step_ms, looped.step_ms, ".1f"),
        ("weights and optimizer, MiB", plain.state_mib, looped.state_mib, ",.1f"),
        ("peak of a step above these, MiB", plain.peak_mib, looped.peak_mib, ",.1f"),
    ]
    lines = [f"{'':<32} {'torch.compile':>14} {'mst_fx':>14} {'ratio':>8}"]
    lines += [f"{name:<32} {a:>14{form}} {b:>14{form}} {b / a:>8.3f}" for name, a, b, form in rows]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what chooses a preset, changes it, and sets the options of mst_fx."""
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    for name in ("steps", "length", "batch", "layers"):
        parser.add_argument(f"--{name}", type=int, help="in place of the preset's")
    parser.add_argument("--chunk-tokens", type=int, help="mst_fx: tokens in one mini-sequence")
    parser.add_argument("--min-bytes", type=int, help="mst_fx: temporaries below this are left alone")
    parser.add_argument("--head-groups", type=int, help="mst_fx: groups of heads that attention runs in")
    parser.add_argument("--accumulate", choices=["float32", "native"], help="mst_fx: dtype of weight gradients' sums")


def chosen(args: argparse.Namespace) -> tuple[Preset, dict[str, Any]]:
    """Return the preset with the command line's changes, and the options of mst_fx."""
    fields = ("steps", "length", "batch", "layers", "chunk_tokens", "min_bytes")
    changes = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    preset = replace(PRESETS[args.preset], **changes)
    if preset.steps <= COMPILING_STEPS:
        raise SystemExit(f"--steps must be above {COMPILING_STEPS}, those that compile")
    options = {"chunk_tokens": preset.chunk_tokens, "min_bytes": preset.min_bytes}
    options |= {"head_groups": args.head_groups, "accumulate": args.accumulate}
    return preset, {name: value for name, value in options.items() if value is not None}


def parse() -> tuple[Preset, torch.device, dict[str, Any]]:
    """Return what the command line chooses, and the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_arguments(parser)
    args = parser.parse_args()
    preset, options = chosen(args)
    return preset, torch.device(args.device), options


def main() -> None:
    preset, device, options = parse()
    data = batches(read_text(), preset, device)
    plain = Trainer(preset, device)
    looped = Trainer(preset, device, backend="mst_fx", options=options)
    train(plain, looped, data, preset.steps)
    apart = max(abs(a - b) for a, b in zip(plain.losses, looped.losses, strict=True))
    input_ids = next(data)
    print(f"\n{preset}\non {device.type}, torch {torch.__version__}, options={options}\n")
    print(table(plain.row(input_ids), looped.row(input_ids)))
    print(f"\nfirst loss {plain.losses[0]:.4f}; largest difference between the two runs' losses {apart:.1e}\n")
    for report in mst_fx.reports():
        print(report)


if __name__ == "__main__":
    main()
