"""How good the predicted peaks are: the report's `peak` and `peak_whole` beside measured peaks, for whole models.

    python examples/benchmarks/predictions.py                          # all models, on a CPU: some minutes
    python examples/benchmarks/predictions.py --model vit t5 --json rows.json

A model has random weights and a middle-sized shape. One step is a forward and a backward through Inductor; "plain" is
without loops, "looped" is what mst_fx plans by itself, but for `chunk_tokens` and `min_bytes`, which fit the small
shapes. Peaks are bytes above those that are there before the step (weights and inputs), with gradients. "Off" is by how
much the predicted peak is above (+) or below (-) the measured one.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import mst_fx

MIB = 2**20
OPTIONS = {"chunk_tokens": 128, "min_bytes": MIB}
BATCH, LENGTH, HIDDEN, HEADS, WIDE, LAYERS, VOCAB = 4, 256, 128, 4, 512, 2, 4096
PIXELS = 96
Step = tuple[Callable[[], torch.Tensor], list[torch.Tensor]]
"""Makes the loss; the parameters and inputs, which are there before the step."""


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
            cells += [f"{measured / MIB:.1f}", f"{predicted / MIB:.1f}", f"{predicted / measured - 1:+.0%}"]
        return "| " + " | ".join([*cells, str(self.loops)]) + " |"


def ids(*shape: int, vocabulary: int = VOCAB) -> torch.Tensor:
    return torch.randint(10, vocabulary, shape or (BATCH, LENGTH))


def of(model: nn.Module, **batch: torch.Tensor) -> Step:
    """A model of transformers, which returns its loss."""
    return (lambda: model(**batch).loss), [*model.parameters(), *model.buffers(), *batch.values()]


def vit() -> Step:
    """A patch has about as many values as a token has features, as in the models that are trained."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=WIDE,
        image_size=PIXELS, patch_size=6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=100,
    )  # fmt: skip
    model = ViTForImageClassification(config).train()
    return of(model, pixel_values=torch.randn(BATCH, 3, PIXELS, PIXELS), labels=torch.randint(0, 100, (BATCH,)))


def whisper() -> Step:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIDE.items()}
    config = WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=80, d_model=HIDDEN, max_source_positions=LENGTH, max_target_positions=LENGTH,
        dropout=0.0, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **sides,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).train()
    return of(model, input_features=torch.randn(BATCH, 80, 2 * LENGTH), labels=ids(BATCH, LENGTH // 2))


SIDE = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": WIDE}


def t5() -> Step:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=HIDDEN // HEADS, d_ff=WIDE, num_layers=LAYERS, num_heads=HEADS,
        dropout_rate=0.0, use_cache=False,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    return of(T5ForConditionalGeneration(config).train(), input_ids=ids(), labels=ids(BATCH, LENGTH // 2))


DECODER = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2, "use_cache": False,
}  # fmt: skip


def moe() -> Step:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, head_dim=HIDDEN // HEADS)
    model = MixtralForCausalLM(config).train()
    model.set_experts_implementation("grouped_mm")
    text = ids()
    return of(model, input_ids=text, labels=text)


def gemma2() -> Step:
    """Attention is eager, with soft caps: its scores are values of the graph."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**DECODER, head_dim=HIDDEN // HEADS, attn_implementation="eager")
    text = ids()
    return of(Gemma2ForCausalLM(config).train(), input_ids=text, labels=text)


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**DECODER, **options)).train()


def adapted(model: nn.Module) -> Step:
    from peft import LoraConfig, get_peft_model

    text = ids()
    return of(get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")), input_ids=text, labels=text)


def lora() -> Step:
    return adapted(llama())


def qlora() -> Step:
    """The weights of the layers have four bits (bitsandbytes, NF4)."""
    import bitsandbytes as bnb

    model = llama().bfloat16()
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            packed.weight.data = layer.weight.data
            model.model.layers.set_submodule(name, packed.to("cpu"))
    return adapted(model)


class Block(nn.Module):
    """As nanoGPT writes it: norms with a bias, one projection for queries, keys and values, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.c_attn, self.c_proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, WIDE), nn.GELU(), nn.Linear(WIDE, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        b, t, c = x.shape
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(c, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.mlp(self.ln_2(x))


class Trunk(nn.Module):
    """Tokens and positions, blocks, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.h, self.ln_f = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(HIDDEN)

    def forward(self, text: torch.Tensor) -> torch.Tensor:  # noqa: D102
        x = self.wte(text) + self.wpe(torch.arange(text.shape[1]))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


def nanogpt() -> Step:
    """The head has the weights of the embedding."""
    model, text, labels = Trunk(), ids(), ids()

    def loss() -> torch.Tensor:
        return F.cross_entropy(F.linear(model(text), model.wte.weight).view(-1, VOCAB), labels.view(-1))

    return loss, [*model.parameters(), text, labels]


def multi_token() -> Step:
    """Four heads, each a block and one matrix for all, under a checkpoint each."""
    model, heads = Trunk(), nn.ModuleList(Block() for _ in range(4))
    text, matrix = ids(BATCH, LENGTH + 4), nn.Parameter(torch.randn(VOCAB, HIDDEN) / math.sqrt(HIDDEN))

    def of_head(x: torch.Tensor, number: int, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(heads[number](x), matrix).view(-1, VOCAB), labels.reshape(-1))

    def loss() -> torch.Tensor:
        x = model(text[:, :LENGTH])
        wanted = [text[:, i + 1 : i + 1 + LENGTH] for i in range(4)]
        return sum(checkpoint(of_head, x, i, labels, use_reentrant=False) for i, labels in enumerate(wanted))

    return loss, [*model.parameters(), *heads.parameters(), matrix, text]


MODELS: dict[str, Callable[[], Step]] = {
    "ViT": vit, "Whisper": whisper, "T5": t5, "Mixtral": moe, "nanoGPT": nanogpt, "multi-token": multi_token,
    "Gemma-2 eager": gemma2, "LoRA": lora, "QLoRA": qlora,
}  # fmt: skip


def measured(loss: Callable[[], torch.Tensor], given: list[torch.Tensor]) -> int:
    """Most bytes at once in a step, above those at its start."""
    trained = [x for x in given if x.requires_grad]

    def step() -> None:
        torch.autograd.grad(loss(), trained, allow_unused=True)

    for _ in range(2):
        step()
    gc.collect()
    gc.disable()  # what is freed in the step would count, however old
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    gc.enable()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def rows(names: list[str], options: dict[str, Any]) -> Iterator[Row]:
    for name in names:
        torch.manual_seed(0)
        loss, given = MODELS[name]()
        resident = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in given}.values())
        torch._dynamo.reset()
        plain = measured(torch.compile(loss), given)
        torch._dynamo.reset()
        before = len(mst_fx.reports())
        looped = measured(torch.compile(loss, backend="mst_fx", options=options), given)
        reports = mst_fx.reports()[before:]
        report = sum(reports[1:], reports[0])
        yield Row(name, plain, report.peak_whole - resident, looped, report.peak - resident, len(report.regions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--chunk-tokens", type=int, default=OPTIONS["chunk_tokens"])
    parser.add_argument("--json", type=Path, help="a file for the rows")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 100
    print(f"torch {torch.__version__}, CPU, {datetime.date.today()}; MiB above weights and inputs\n")
    print("| model | plain | predicted | off | looped | predicted | off | loops |")
    print("|---|---|---|---|---|---|---|---|")
    found = []
    for row in rows(args.model, OPTIONS | {"chunk_tokens": args.chunk_tokens}):
        print(row, flush=True)
        found.append(asdict(row))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
