"""What mst_fx saves, by model and length: predicted from shapes alone, on a machine without a GPU, without weights.

    python examples/what_it_saves.py                                    # five shapes, four lengths: some minutes
    python examples/what_it_saves.py --config path/to/config.json --tokens 32768    # yours, as transformers saves it

The model is made on the device "meta", so it takes no memory, and captured whole, each layer under activation
checkpointing (--no-checkpointing: without). The numbers are the report's `peak_whole` and `peak`: the most bytes that
are alive over one training step at batch 1, in bfloat16, with weights, gradients and activations, and without the
optimizer's state (`benchmarks/tradeoff.md` has such predictions beside measured peaks). Attention is the kernel that a
GPU has, without a mask.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from train_lm import ATTENTION
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

import mst_fx

GIB = 2**30
TOKENS = (8192, 32768, 65536, 131072)
LLAMA = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 128256}
SHAPES: dict[str, PretrainedConfig] = {
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "Qwen3-1.7B": Qwen3Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "Llama-3.2-3B": LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        tie_word_embeddings=True, **LLAMA,
    ),
    "Llama-3-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA
    ),
    "Llama-3-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model at one length; bytes.

    Attributes:
        weights: of the weights and their gradients, which exist in any case.
        without, with_loops: the predicted peak of a step.
    """

    model: str
    tokens: int
    weights: int
    without: int
    with_loops: int

    def __str__(self) -> str:
        sizes = (self.weights, self.without, self.with_loops)
        columns = " | ".join(f"{size / GIB:,.1f}" for size in sizes)
        freed = 1 - (self.with_loops - self.weights) / max(self.without - self.weights, 1)
        return f"| {self.model} | {self.tokens:,} | {columns} | {freed:.0%} |"


def predicted(name: str, config: PretrainedConfig, tokens: int, *, checkpointing: bool) -> Row:
    """Capture one step of a model and return what the report predicts."""
    config._attn_implementation, config.use_cache, config.max_position_embeddings = ATTENTION, False, tokens
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        ids = torch.zeros(1, tokens, dtype=torch.long)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    report = mst_fx.explain(lambda ids: model(input_ids=ids, labels=ids).loss, ids)
    weights = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    return Row(name, tokens, weights, report.peak_whole, report.peak)


def rows(shapes: dict[str, PretrainedConfig], lengths: list[int], *, checkpointing: bool) -> Iterator[Row]:
    for name, config in shapes.items():
        for tokens in lengths:
            yield predicted(name, config, tokens, checkpointing=checkpointing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a config.json of a causal language model, or a folder with one")
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--no-checkpointing", action="store_true")
    args = parser.parse_args()
    shapes = {name: SHAPES[name] for name in args.model}
    if args.config and not Path(args.config).exists():
        parser.error(f"there is no {args.config}")
    if args.config:
        shapes = {args.config: AutoConfig.from_pretrained(args.config)}
    checkpointing = not args.no_checkpointing
    print(
        f"torch {torch.__version__}, {'checkpointed layers' if checkpointing else 'no checkpointing'}; GiB, predicted\n"
    )
    print(
        "| model | tokens | weights and gradients | peak without mst_fx | with | saved, weights and gradients aside |"
    )
    print("|---|---|---|---|---|---|")
    every = rows(shapes, args.tokens, checkpointing=checkpointing)
    for row in tqdm(every, total=len(shapes) * len(args.tokens), leave=False):
        print(row, flush=True)


if __name__ == "__main__":
    main()
