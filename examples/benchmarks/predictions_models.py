"""The models whose peaks `predictions.py` measures: random weights, middle-sized shapes, unmodified code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

BATCH, LENGTH, HIDDEN, HEADS, WIDE, LAYERS, VOCAB = 4, 256, 128, 4, 512, 2, 4096
PIXELS = 96
Step = tuple[Callable[[], torch.Tensor], list[torch.Tensor]]
"""Makes the loss; the parameters and inputs, which are there before the step."""


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
            packed.weight.data = layer.weight.data.cpu()
            model.model.layers.set_submodule(name, packed.to(layer.weight.device))
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
        x = self.wte(text) + self.wpe(torch.arange(text.shape[1], device=text.device))
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
