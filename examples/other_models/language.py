"""Language models of other packages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from other_models.case import (
    BATCH,
    DENSE,
    EXPERT,
    HEADS,
    HIDDEN,
    LAYERS,
    LENGTH,
    VOCAB,
    Built,
    OtherCase,
    Trained,
    language_model,
    tokens,
)


def language_cases() -> Iterator[OtherCase]:
    """Return the language models of all packages, those that are not installed too."""
    for title, options in X_TRANSFORMERS.items():
        yield OtherCase("x_transformers", title, partial(x_decoder, options))
    yield OtherCase("x_transformers", "encoder-decoder", x_encoder_decoder)
    yield OtherCase("x_transformers", "autoregressive", x_autoregressive)
    for title, name in LITGPT.items():
        yield OtherCase("litgpt", title, partial(lit_gpt, name))
    yield OtherCase("litgpt", "head-in-pieces", partial(lit_gpt, "Llama-3-8B", pieces=8))
    yield OtherCase("litgpt", "lora", lit_lora)
    for name in TORCHTUNE:
        yield OtherCase("torchtune", name, partial(tune, name))
    yield OtherCase("torchtune", "chunked-loss", partial(tune, "llama3", chunked=True))
    yield OtherCase("torchtune", "distilled", tune_distilled)
    yield OtherCase("torchtune", "dpo", tune_dpo)
    yield OtherCase("torchtune", "lora", tune_lora)
    for family in ("llama3", "qwen3", "deepseek_v3"):
        yield OtherCase("torchtitan", family, partial(titan, family), 2048)
    for block in ("sequential", "llama"):
        for activation in ("swiglu", "gelu"):
            yield OtherCase("olmo", f"{block}-{activation}", partial(olmo, block, activation))
    yield OtherCase("esm", "esm2", esm2, 33)
    yield OtherCase("esm", "msa-transformer", msa, 33)
    yield OtherCase("mambapy", "mamba", mamba)
    yield OtherCase("mambapy", "jamba", jamba)
    yield OtherCase("xlstm", "mlstm", partial(xlstm, ()))
    yield OtherCase("xlstm", "large", xlstm_large)
    for layout in ("apart", "stacked", "one-product"):
        yield OtherCase("torch", f"multi-token-{layout}", partial(multi_token, layout))


X_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "glu": {"ff_glu": True},
    "swiglu": {"ff_glu": True, "ff_swish": True, "use_rmsnorm": True, "rotary_pos_emb": True, "ff_no_bias": True},
    "glu-mult-bias": {"ff_glu": True, "ff_glu_mult_bias": True},
    "relu-squared": {"ff_relu_squared": True},
    "post-act-norm": {"ff_post_act_ln": True},
    "macaron": {"macaron": True},
    "sandwich": {"sandwich_norm": True},
    "residual-gates": {"gate_residual": True},
    "scaled-residual": {"scale_residual": True},
    "post-norm": {"pre_norm": False},
    "simple-norm": {"use_simple_rmsnorm": True},
    "shifted-tokens": {"shift_tokens": 1},
    "alibi": {"alibi_pos_bias": True},
    "hyper-connections": {"num_residual_streams": 2},
    "mixture-of-softmax": {"wrapper": {"mixture_of_softmax": True}},
    "tied": {"wrapper": {"tie_embedding": True}},
    "memory-tokens": {"wrapper": {"num_memory_tokens": 4}},
    "several-heads": {"wrapper": {"num_output_heads": 2}},
}


def x_decoder(options: dict[str, Any]) -> Built:
    from x_transformers import Decoder, TransformerWrapper

    options = dict(options)
    wrapper = options.pop("wrapper", {})
    layers = Decoder(dim=HIDDEN, depth=LAYERS, heads=HEADS, attn_dim_head=HIDDEN // HEADS, **options)
    model = TransformerWrapper(num_tokens=VOCAB, max_seq_len=2 * LENGTH, attn_layers=layers, **wrapper)
    heads = wrapper.get("num_output_heads")
    return language_model(model, (lambda out: sum(out)) if heads else (lambda out: out))


def x_encoder_decoder() -> Built:
    from x_transformers import XTransformer

    sides = {
        f"{side}_{name}": value
        for side in ("enc", "dec")
        for name, value in {"num_tokens": VOCAB, "depth": LAYERS, "heads": HEADS, "max_seq_len": 2 * LENGTH}.items()
    }
    model = XTransformer(dim=HIDDEN, **sides)
    return Trained(model, lambda model, source, target: model(source, target)), {
        "source": tokens(),
        "target": tokens(),
    }


def x_autoregressive() -> Built:
    from x_transformers import AutoregressiveWrapper

    model, batch = x_decoder({"ff_glu": True})
    return Trained(AutoregressiveWrapper(model.model), lambda model, text: model(text)), batch


LITGPT = {
    "pythia": "pythia-14m",
    "llama": "Llama-3-8B",
    "gemma": "Gemma-2b",
    "gemma2": "Gemma-2-2b",
    "gemma3": "Gemma-3-1b-it",
    "phi": "phi-2",
    "falcon": "falcon-7b",
    "mixtral": "Mixtral-8x7B-v0.1",
    "olmo2": "OLMo-2-1124-7B",
    "qwen3": "Qwen3-0.6B",
    "qwen3-moe": "Qwen3-30B-A3B",
}
SMALL = {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": HEADS, "n_query_groups": HEADS, "block_size": 2 * LENGTH}


def lit_config(module: Any, name: str) -> Any:
    given = module.Config.from_name(name)
    small = SMALL | {"padded_vocab_size": VOCAB, "vocab_size": VOCAB, "head_size": HIDDEN // HEADS}
    small |= {"intermediate_size": DENSE, "rope_adjustments": None, "rope_indices": given.rope_indices and [0, 1]}
    if given.n_expert:
        small |= {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": EXPERT}
    if given.sliding_window_size:
        small |= {"sliding_window_size": 16, "sliding_window_indices": [0, 1]}
    return module.Config.from_name(name, **small)


def lit_gpt(name: str, pieces: int = 0) -> Built:
    import litgpt
    from litgpt.utils import chunked_cross_entropy

    model = litgpt.GPT(lit_config(litgpt, name))

    def loss(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
        logits = model(text[:, :-1].contiguous(), lm_head_chunk_size=pieces)
        return chunked_cross_entropy(logits, text[:, 1:], chunk_size=pieces)

    return Trained(model, loss), {"text": tokens()}


def lit_lora() -> Built:
    from litgpt import lora

    config = lit_config(lora, "Llama-3-8B")
    for name in ("query", "key", "value", "projection", "mlp", "head"):
        setattr(config, f"lora_{name}", True)
    config.lora_r, config.lora_alpha = 4, 8
    model = lora.GPT(config)
    lora.mark_only_lora_as_trainable(model)
    return language_model(model)


SHAPE = {"vocab_size": VOCAB, "num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": HEADS, "embed_dim": HIDDEN}
SHAPE |= {"max_seq_len": 2 * LENGTH, "intermediate_dim": DENSE}
TORCHTUNE: dict[str, dict[str, Any]] = {
    "llama2": {},
    "llama3": {},
    "llama3_1": {},
    "llama3_2": {},
    "mistral": {},
    "phi3": {},
    "qwen2": {},
    "gemma": {"head_dim": HIDDEN // HEADS},
    "gemma2": {"head_dim": HIDDEN // HEADS},
}


def tuned(name: str, prefix: str = "", **more: Any) -> nn.Module:
    module = __import__(f"torchtune.models.{name}._component_builders", fromlist=[name])
    shape = dict(SHAPE)
    if prefix and name == "llama2":
        shape.pop("intermediate_dim")
    return getattr(module, prefix + name)(**shape, **TORCHTUNE[name], **more)


def tune(name: str, chunked: bool = False) -> Built:
    if not chunked:
        return language_model(tuned(name))
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    model, loss_fn = tuned(name), CEWithChunkedOutputLoss(num_output_chunks=4)
    model.set_num_output_chunks(4)
    return Trained(model, lambda model, text: loss_fn(model(text[:, :-1]), text[:, 1:])), {"text": tokens()}


def tune_distilled() -> Built:
    from torchtune.modules.loss import ForwardKLLoss

    loss_fn, pair = ForwardKLLoss(), nn.ModuleDict({"student": tuned("llama3"), "teacher": tuned("llama3")})
    pair["teacher"].requires_grad_(False)

    def loss(pair: Any, text: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = pair["teacher"](text[:, :-1])
        return loss_fn(pair["student"](text[:, :-1]), wanted, text[:, 1:])

    return Trained(pair, loss), {"text": tokens()}


def tune_dpo() -> Built:
    from torchtune.rlhf import get_batch_log_probs
    from torchtune.rlhf.loss import DPOLoss

    loss_fn, pair = DPOLoss(), nn.ModuleDict({"policy": tuned("llama3"), "reference": tuned("llama3")})
    pair["reference"].requires_grad_(False)

    def chances(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
        return get_batch_log_probs(model(text), text)

    def loss(pair: Any, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            known = [chances(pair["reference"], text) for text in (chosen, rejected)]
        own = [chances(pair["policy"], text) for text in (chosen, rejected)]
        return loss_fn(*own, *known)[0].mean()

    return Trained(pair, loss), {"chosen": tokens(), "rejected": tokens()}


def tune_lora() -> Built:
    modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
    adapted = {"apply_lora_to_mlp": True, "apply_lora_to_output": True, "lora_rank": 4, "lora_alpha": 8.0}
    model = tuned("llama3", "lora_", lora_attn_modules=modules, **adapted)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
        if name.endswith("lora_b.weight"):
            nn.init.normal_(parameter, std=0.02)
    return language_model(model)


def titan(family: str) -> Built:
    from torchtitan.models.common.attention import ScaledDotProductAttention

    module = __import__(f"torchtitan.models.{family}", fromlist=[family])
    config = module._debugmodel("flex", *(["standard"] if family == "deepseek_v3" else []))
    config.layers = config.layers[:LAYERS]
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    return language_model(model)


def olmo(block: str, activation: str) -> Built:
    from olmo.config import ActivationType, BlockType, ModelConfig
    from olmo.model import OLMo

    config = ModelConfig(
        d_model=HIDDEN, n_heads=HEADS, n_layers=LAYERS, max_sequence_length=2 * LENGTH, vocab_size=VOCAB,
        embedding_size=None, mlp_hidden_size=2 * DENSE if activation == "swiglu" else DENSE,
        activation_type=ActivationType(activation), block_type=BlockType(block), rope=True, init_device="cpu",
        attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0, weight_tying=False,
    )  # fmt: skip
    return language_model(OLMo(config), lambda out: out.logits)


def esm2() -> Built:
    import esm

    model = esm.ESM2(num_layers=LAYERS, embed_dim=HIDDEN, attention_heads=HEADS, token_dropout=False)
    return masked(model, tokens(BATCH, LENGTH, high=24))


def msa() -> Built:
    from argparse import Namespace

    import esm

    args = Namespace(
        layers=LAYERS, embed_dim=HIDDEN, logit_bias=True, ffn_embed_dim=DENSE, attention_heads=HEADS, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, max_positions=64, embed_positions_msa=True, max_tokens=2**14,
        embed_positions_msa_dim=HIDDEN,
    )  # fmt: skip
    model = esm.MSATransformer(args, esm.data.Alphabet.from_architecture("msa_transformer"))
    return masked(model, tokens(BATCH, 3, LENGTH, high=24))


def masked(model: nn.Module, text: torch.Tensor) -> Built:
    """Return a model that is trained to tell the tokens that it reads."""

    def loss(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(text)["logits"].flatten(0, -2), text.flatten())

    return Trained(model, loss), {"text": text}


def mamba() -> Built:
    from mambapy.mamba import Mamba, MambaConfig

    layers = Mamba(MambaConfig(d_model=HIDDEN, n_layers=LAYERS, d_state=8, pscan=False))
    return language_model(nn.Sequential(nn.Embedding(VOCAB, HIDDEN), layers, nn.Linear(HIDDEN, VOCAB)))


def jamba() -> Built:
    from mambapy.jamba import JambaLM, JambaLMConfig

    config = JambaLMConfig(
        d_model=HIDDEN, n_layers=LAYERS, mlp_size=DENSE, d_state=8, pscan=False, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, attn_layer_offset=1, attn_layer_period=2, num_experts=4, num_experts_per_tok=2,
        expert_layer_offset=1, expert_layer_period=2, vocab_size=VOCAB,
    )  # fmt: skip
    return language_model(JambaLM(config), lambda out: out[0])


def xlstm(slstm_at: tuple[int, ...]) -> Built:
    from xlstm import mLSTMBlockConfig, mLSTMLayerConfig, xLSTMLMModel, xLSTMLMModelConfig

    layer = mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=HEADS)
    config = xLSTMLMModelConfig(
        vocab_size=VOCAB, embedding_dim=HIDDEN, num_blocks=LAYERS, context_length=LENGTH, slstm_at=list(slstm_at),
        mlstm_block=mLSTMBlockConfig(mlstm=layer),
    )  # fmt: skip
    return language_model(xLSTMLMModel(config))


def xlstm_large() -> Built:
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    config = xLSTMLargeConfig(
        embedding_dim=HIDDEN, num_heads=HEADS, num_blocks=LAYERS, vocab_size=VOCAB, mode="train", chunk_size=8,
        chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native", step_kernel="native",
        return_last_states=True,
    )  # fmt: skip
    return language_model(xLSTMLarge(config), lambda out: out[0])


class MultiToken(nn.Module):
    """A trunk and a head for each of the next tokens, as models for self-speculation are trained.

    Args:
        layout: "apart" is a head by itself for each, "stacked" all logits stacked, and "one-product" all heads in one
            projection.
    """

    def __init__(self, layout: str, ahead: int = 3) -> None:
        super().__init__()
        self.layout, self.ahead = layout, ahead
        self.embedding, self.norm = nn.Embedding(VOCAB, HIDDEN), nn.RMSNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, DENSE), nn.Linear(DENSE, HIDDEN)
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, VOCAB, bias=False) for _ in range(ahead))
        self.wide = nn.Linear(HIDDEN, ahead * VOCAB, bias=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return the loss of all tokens ahead."""
        length = text.shape[1] - self.ahead
        x = self.embedding(text[:, :length])
        x = self.norm(x + self.down(F.silu(self.up(x))))
        wanted = [text[:, 1 + i : 1 + i + length] for i in range(self.ahead)]
        if self.layout == "apart":
            pairs = zip(self.heads, wanted, strict=True)
            losses = [F.cross_entropy(head(x).flatten(0, 1), y.flatten()) for head, y in pairs]
            return torch.stack(losses).mean()
        if self.layout == "stacked":
            logits = torch.stack([head(x) for head in self.heads], dim=-2)
        else:
            logits = self.wide(x).unflatten(-1, (self.ahead, VOCAB))
        return F.cross_entropy(logits.flatten(0, -2), torch.stack(wanted, -1).flatten())


def multi_token(layout: str) -> Built:
    return MultiToken(layout), {"text": tokens()}
