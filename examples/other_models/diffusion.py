"""Models of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from other_models.case import BATCH, HEADS, HIDDEN, LAYERS, Built, OtherCase, denoiser

HEAD_DIM = HIDDEN // HEADS
DEEP = {"num_layers": LAYERS, "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
PAIRED = DEEP | {"joint_attention_dim": 32}


def diffusion_cases() -> Iterator[OtherCase]:
    """Return the models of diffusers."""
    for title, (cls, options, batch) in MODELS.items():
        yield OtherCase("diffusers", title, partial(of_diffusers, cls, options, batch), 0)


def of_diffusers(cls: str, options: dict[str, Any], batch: Callable[[], dict[str, Any]]) -> Built:
    """Return a model of this class, with its first result as the loss."""
    import diffusers

    return denoiser(getattr(diffusers, cls)(**options), **batch(), return_dict=False)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(BATCH, *shape)


def times() -> torch.Tensor:
    return torch.tensor([3.0, 17.0])


def steps() -> torch.Tensor:
    return torch.tensor([3, 17])


def image(channels: int = 4, size: int = 8) -> dict[str, Any]:
    return {"hidden_states": noise(channels, size, size), "timestep": steps()}


def flux_batch() -> dict[str, Any]:
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
    ids["img_ids"][:, 1], ids["img_ids"][:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {"hidden_states": noise(16, 4), "encoder_hidden_states": noise(8, 32), "timestep": times() / 1000, **ids}


def flux2_batch() -> dict[str, Any]:
    ids = {"img_ids": torch.zeros(16, 4), "txt_ids": torch.zeros(8, 4)}
    return flux_batch() | ids | {"guidance": torch.ones(BATCH)}


MASK = partial(torch.ones, BATCH, 8)
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "dit": (
        "DiTTransformer2DModel",
        DEEP | {"in_channels": 4, "sample_size": 8, "num_embeds_ada_norm": 20},
        lambda: image() | {"class_labels": torch.tensor([1, 2])},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        DEEP
        | {"sample_size": 8, "cross_attention_dim": HIDDEN, "caption_channels": 32, "use_additional_conditions": False},
        lambda: image() | {"encoder_hidden_states": noise(8, 32)},
    ),
    "geglu-blocks": (
        "Transformer2DModel",
        DEEP | {"in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": 32},
        lambda: {"hidden_states": noise(32, 8, 8), "encoder_hidden_states": noise(8, 32)},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        PAIRED
        | {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "caption_projection_dim": HIDDEN,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 8,
        },
        lambda: image() | {"encoder_hidden_states": noise(8, 32), "pooled_projections": noise(32)},
    ),
    "flux": (
        "FluxTransformer2DModel",
        PAIRED | {"in_channels": 4, "num_single_layers": 1, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)},
        lambda: flux_batch() | {"pooled_projections": noise(32)},
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        PAIRED
        | {"in_channels": 4, "num_single_layers": 1, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
        flux2_batch,
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        PAIRED
        | {
            "in_channels": 4,
            "num_single_layers": 1,
            "axes_dims_rope": (4, 4, 8),
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
            "approximator_num_channels": 8,
        },
        flux_batch,
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS,
            "joint_attention_dim": 32,
            "caption_projection_dim": HIDDEN,
            "pos_embed_max_size": 64,
        },
        lambda: image() | {"encoder_hidden_states": noise(8, 32), "timestep": times()},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        DEEP
        | {
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 8,
        },
        lambda: {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(8, 32), "timestep": steps()},
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        DEEP
        | {
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 16,
            "sample_size": 8,
            "pos_embed_max_size": 8,
            "rope_axes_dim": (8, 8),
        },
        lambda: (
            image()
            | {"encoder_hidden_states": noise(12, 32)}
            | dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.full((BATCH, 2), 8.0))
        ),
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        DEEP | {"in_channels": 4, "out_channels": 4, "cross_attention_dim": HIDDEN, "caption_channels": 32},
        lambda: {
            "hidden_states": noise(32, 4),
            "encoder_hidden_states": noise(8, 32),
            "timestep": steps(),
            "encoder_attention_mask": MASK(),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        DEEP
        | {"in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 176, "rope_max_seq_len": 32},
        lambda: {"hidden_states": noise(4, 2, 8, 8), "encoder_hidden_states": noise(8, 32), "timestep": steps()},
    ),
    "mochi": (
        "MochiTransformer3DModel",
        DEEP | {"in_channels": 4, "pooled_projection_dim": 32, "text_embed_dim": 32, "time_embed_dim": 16},
        lambda: {
            "hidden_states": noise(4, 2, 8, 8),
            "encoder_hidden_states": noise(8, 32),
            "timestep": steps(),
            "encoder_attention_mask": MASK(dtype=torch.bool),
        },
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": HIDDEN,
            "num_layers": LAYERS,
            "num_refiner_layers": 1,
            "num_attention_heads": HEADS,
            "num_kv_heads": HEADS,
            "multiple_of": 16,
            "axes_dim_rope": (4, 4, 8),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 32,
        },
        lambda: (
            image()
            | {
                "timestep": times(),
                "encoder_hidden_states": noise(8, 32),
                "encoder_attention_mask": MASK(dtype=torch.bool),
            }
        ),
    ),
    "sana": (
        "SanaTransformer2DModel",
        DEEP
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": HEADS,
            "cross_attention_head_dim": HEAD_DIM,
            "cross_attention_dim": HIDDEN,
            "caption_channels": 32,
            "sample_size": 8,
        },
        lambda: image() | {"encoder_hidden_states": noise(8, 32)},
    ),
    "stable-audio": (
        "StableAudioDiTModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": LAYERS,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "time_proj_dim": 16,
            "global_states_input_dim": 16,
            "cross_attention_input_dim": 32,
        },
        lambda: {
            "hidden_states": noise(4, 16),
            "timestep": times(),
            "encoder_hidden_states": noise(8, 32),
            "global_hidden_states": noise(1, 16),
        },
    ),
    "allegro": (
        "AllegroTransformer3DModel",
        DEEP
        | {
            "cross_attention_dim": HIDDEN,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 2,
            "caption_channels": 32,
        },
        lambda: {"hidden_states": noise(4, 2, 8, 8), "encoder_hidden_states": noise(8, 32), "timestep": steps()},
    ),
    "latte": (
        "LatteTransformer3DModel",
        DEEP
        | {
            "in_channels": 4,
            "cross_attention_dim": HIDDEN,
            "caption_channels": 32,
            "sample_size": 8,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "video_length": 2,
            "attention_bias": True,
            "norm_elementwise_affine": False,
        },
        lambda: {"hidden_states": noise(4, 2, 8, 8), "encoder_hidden_states": noise(8, 32), "timestep": steps()},
    ),
    "prior": (
        "PriorTransformer",
        DEEP | {"embedding_dim": 32, "num_embeddings": 7, "additional_embeddings": 4},
        lambda: {
            "hidden_states": noise(32),
            "timestep": steps(),
            "proj_embedding": noise(32),
            "encoder_hidden_states": noise(7, 32),
        },
    ),
    "unet-condition": (
        "UNet2DConditionModel",
        {
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
        lambda: {"sample": noise(4, 16, 16), "timestep": steps(), "encoder_hidden_states": noise(8, 32)},
    ),
}
