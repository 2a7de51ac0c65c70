"""Models of transformers, small, and as they come."""

from __future__ import annotations

import pytest
import torch

V = 160


transformers = pytest.importorskip("transformers")


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "attn_implementation": "eager",
}


def config(name):
    if name == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": V}
        off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "use_cache": False}
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        return transformers.GPT2Config(**sizes, **off, **ends, attn_implementation="eager")
    kinds = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "gemma2": "Gemma2Config", "phi3": "Phi3Config"}
    extra = {"head_dim": 8} if name == "gemma2" else {}
    return getattr(transformers, kinds[name])(**SIZES, **extra)


def loss_of(model, ids, labels):
    return model(input_ids=ids, labels=labels).loss


def make(name, checkpointing=False):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(name)).train()
    model.loss_type = "ForCausalLM"  # transformers cannot tell it from GPT-2's class name; its warning breaks the graph
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
