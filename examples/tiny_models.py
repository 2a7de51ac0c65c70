"""Tiny random models of any architecture that transformers registers, and inputs for one training step of each.

A config class is shrunk by the names of its fields: widths, depths, heads and vocabularies get small values wherever
they stand, everything else keeps its default.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

HIDDEN, HEADS, HEAD_DIM, LAYERS, VOCAB, LETTERS = 64, 4, 16, 2, 331, 32
DENSE, EXPERT, SHARED = 176, 112, 208
FEED_FORWARD = frozenset([DENSE, EXPERT, SHARED, 4 * HIDDEN])
"""Widths inside MLPs and experts: those that a config sets, and four times the model's."""
BATCH, LENGTH, IMAGE, PATCH = 2, 24, 32, 8

SIZES: list[tuple[str, Any]] = [  # the first expression that matches the whole name of a field decides
    (r"(src_|tgt_|decoder_|text_|unpadded_)?vocab_size(_per_layer_input)?", VOCAB),
    (r".*_vocab_size|.*vocab_size_.*|audio_vocab.*|.*_vocab", 64),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k|num_selected_experts|moe_num_active.*|router_topk", 2),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"n_groups|n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(shared|moe_shared).*intermediate_size", SHARED),
    (r"(moe|expert).*(intermediate|ffn|ffn_hidden)_?(size|dim)", EXPERT),
    (
        r"(dense_|.*encoder_)?intermediate_size(_mlp)?|.*ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|n_inner|d_inner|"
        r"mlp_dim|feed_forward_size|hidden_dim_mlp|inner_dim|prediction_head_size",
        DENSE,
    ),
    (r"(cross_)?(num|n)_(key_value|kv)_heads|num_kv_heads|swa_num_key_value_heads|num_query_groups", HEADS),
    (r"(.*_)?(num_attention|attention|num|n)_heads?|n_head|encoder_attention_heads|decoder_attention_heads", HEADS),
    (r"linear_num_(key|value)_heads|linear_num_heads|mamba_n_heads|n_mamba_heads|mamba_num_heads", HEADS),
    (
        r"(.*_)?head_dim|attention_head_size|attention_head_dim|d_kv|d_head|dim_head|kv_channels|v_head_dim|"
        r"qk_nope_head_dim|linear_(key|value|)_?head_dim",
        HEAD_DIM,
    ),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"mamba_d_state", 8),
    (r"mamba_d_head|mamba_headdim|mamba_head_dim", 2 * HEAD_DIM),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"(kv|q|o)_lora_rank|.*_lora_rank|.*lowrank", 32),
    (
        r"(num_|n_)?(hidden_|encoder_|decoder_)?(layers?|blocks)|depth|n_layers?|num_layers_per_stack|"
        r".*attends_per_block|num_(spatial|temporal|auxiliary)_layers",
        LAYERS,
    ),
    (
        r"hidden_size(_global)?|d_model|d_latents|n_embd|embed_dim|emb_dim|dim|embedding_dim|.*hidden_size|hidden_dim|"
        r"word_embed_proj_dim|lru_width|projection_dim|.*embedding_size|vision_output_dim|.*_bottleneck_size",
        HIDDEN,
    ),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_sequence_length|seq_length|"
        r"max_(source|target)_positions|model_max_length",
        128,
    ),
    (r"sliding_window(_size)?|attention_window_size|attention_chunk_size|local_attention|window_size_1d", 16),
    (r"(mamba_)?chunk_size|index_block_size|chunk_size_feed_forward", 8),
    (r"image_size|crop_size", IMAGE),
    (r"patch_size", PATCH),
]
DEPTHS = ("depths", "num_block_repeats", "n_attn_blocks")
ZERO = re.compile(
    r".*(dropout|drop|dropout_prob|pdrop|drop_path_rate|layerdrop|jitter_noise|dropout_rate|dropout_p|"
    r"drop_rate)$|mask_time_prob|mask_feature_prob|.*_drop_prob"
)


@dataclass(frozen=True)
class Case:
    """One architecture: a task of transformers and the class that it registers for a model type."""

    task: str
    model_type: str
    class_name: str

    @property
    def name(self) -> str:
        """A unique name that can be a file name."""
        return f"{self.task}.{self.class_name}.{self.model_type}"

    @property
    def vocabulary(self) -> int:
        """The number of letters where speech is spelled, else that of tokens."""
        return LETTERS if self.task == "ctc" else VOCAB

    def training(self) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Return the model and one batch, the same each time."""
        return make(self), inputs(self, make(self))


TASKS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "image-text": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}


NO_LOSS = re.compile(r".*WithTeacher|PPLCNet.*|ShieldGemma2.*|Gemma4.*Assistant.*|Blip2ForImageTextRetrieval")
"""Classes for inference only: they return no loss to train with."""


def cases(tasks: tuple[str, ...]) -> Iterator[Case]:
    """Return every class that transformers registers for the tasks, once for each task, if it computes a loss."""
    seen: set[tuple[str, str]] = set()
    for task in tasks:
        for model_type, names in getattr(modeling_auto, TASKS[task]).items():
            for name in [names] if isinstance(names, str) else names:
                if (task, name) not in seen and not NO_LOSS.fullmatch(name):
                    seen.add((task, name))
                    yield Case(task, model_type, name)


EFFICIENT = {"image_size": IMAGE, "width_coefficient": 0.2, "depth_coefficient": 1.0}
INDEXER = dict(indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4)
LOCAL = {"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 8, "is_decoder": False}
TWICE = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "hybrid", "hybrid"], "hybrid_layer_ids": [1, 2]}
SHARED_BLOCK = TWICE | {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM}  # tied: it takes two
FILTERS = {"num_filters": 4}
THETA = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
EXTRA: dict[str, dict[str, Any]] = {  # what the names of fields do not tell, by model type or class
    "align": {"vision_config": EFFICIENT},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": THETA}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": EFFICIENT | {"hidden_dim": 4 * HIDDEN},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": HIDDEN // 4}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech5_ctc": {"encoder_config": {"vocab_size": LETTERS}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": HIDDEN}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_rope_head_dim": 16, "qk_head_dim": 32, "head_dim": 16},
    "mamba2": {"head_dim": 32},
    "mimo_v2_flash": {"num_key_value_heads": HEADS // 2},
    "mobilevitv2": {"patch_size": 2},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "musicflamingo": {"audio_config": {"model_type": "audioflamingo3_encoder"}},
    "perceiver": {"num_cross_attention_heads": 1, "num_latents": 16},
    "qwen4_exp": INDEXER,
    "reformer": LOCAL | {"is_decoder": True},
    "ReformerForMaskedLM": LOCAL,
    "speech-encoder-decoder": {"pad_token_id": 0},
    "vibevoice": {"audio_config": FILTERS, "semantic_model_config": FILTERS},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": FILTERS, "semantic_tokenizer_encoder_config": FILTERS},
    "videoprism": {"vision_config": {"num_frames": 2, "tubelet_size": [1, PATCH, PATCH]}},
    "xmod": {"default_language": "en_XX"},
    "zamba": SHARED_BLOCK,
    "zamba2": SHARED_BLOCK,
    "zaya": {"num_experts_per_tok": 1},
}


def make(case: Case) -> PreTrainedModel:
    """Return the model with random weights, in training mode, without dropout."""
    cls = getattr(transformers, case.class_name)
    extra = EXTRA.get(case.model_type, {}) | EXTRA.get(case.class_name, {})
    extra |= {"vocab_size": case.vocabulary} if case.task == "ctc" else {}
    config = tiny(cls.config_class or CONFIG_MAPPING[case.model_type], extra)
    torch.manual_seed(0)
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    model = cls(config).train()
    if "labels" in inspect.signature(model.forward).parameters and case.task == "causal-lm":
        model.loss_type = "ForCausalLM"  # where the class name does not tell, transformers warns and breaks the graph
    set_experts(model, "batched_mm")
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def set_experts(model: PreTrainedModel, implementation: str) -> bool:
    """Choose how experts are computed; return False where the model has no experts, or only one way."""
    try:
        model.set_experts_implementation(implementation)
    except (AttributeError, ValueError):
        return False
    return True


def tiny(config_class: type[PretrainedConfig], extra: dict[str, Any]) -> PretrainedConfig:
    """Return a config of the class with small sizes."""
    default = config_class()
    wanted = merged(small_fields(default), extra)
    config = config_class(**wanted)
    return config_class(**merged(wanted, shortened(config)))


def merged(fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with others in their place, sub-configs field by field."""
    out = dict(fields)
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = merged(out[name], value) if both else value
    return out


def small_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields that differ from the defaults."""
    wanted: dict[str, Any] = {}
    staged = any(
        isinstance(getattr(config, name, None), (list, tuple)) for name in (*DEPTHS, "hidden_sizes", "num_heads")
    )
    for name, value in config.to_dict().items():
        child = getattr(config, name, None) if isinstance(value, dict) else None
        if isinstance(child, PretrainedConfig):
            wanted[name] = small_fields(child)
        elif ZERO.fullmatch(name) and isinstance(value, float):
            wanted[name] = 0.0
        elif staged:  # in a pyramid the widths and the sizes of the maps depend on one another
            wanted |= {name: [1] * len(value)} if name in DEPTHS else {}
        else:
            small = small_value(name, value)
            wanted |= {name: small} if small is not None else {}
    return wanted | few_layers(config, wanted)


def small_value(name: str, value: Any) -> Any:
    """Return the value of one field; None where the default stays."""
    if name == "use_cache":
        return False
    if value is None:
        return {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS, "pad_token_id": 0, "vocab_size": VOCAB}.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return None
    if name.endswith(("_token_id", "_token_index")):
        return 5 if value >= VOCAB else None
    return next((small for pattern, small in SIZES if re.fullmatch(pattern, name)), None)


def few_layers(config: PretrainedConfig, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return one layer of each kind, where layers differ in kind."""
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    name = (config.attribute_map or {}).get("layer_types", "layer_types")
    given = getattr(getattr(type(config), name, None), "fset", True) is not None
    if not kinds or not given or "num_hidden_layers" not in wanted:
        return {}
    types = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
    return {"layer_types": types, "num_hidden_layers": len(types)}


def shortened(config: PretrainedConfig) -> dict[str, Any]:
    """Shorten lists with one entry for each layer of the default depth to the layers that are left."""
    lists: dict[str, Any] = {}
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in config.to_dict().items():
        child = getattr(config, name, None) if isinstance(value, dict) else None
        if isinstance(child, PretrainedConfig):
            lists[name] = shortened(child)
        elif isinstance(value, list) and layers and len(value) > max(layers, 8):
            lists[name] = value[:layers]
    return lists


Random = torch.Generator
Inputs = dict[str, Any]


def ids(random: Random, *shape: int, high: int = VOCAB) -> torch.Tensor:
    return torch.randint(10, high, (BATCH, *shape), generator=random)


def noise(random: Random, *shape: int) -> torch.Tensor:
    return torch.randn(BATCH, *shape, generator=random)


def inputs(case: Case, model: PreTrainedModel) -> Inputs:
    """Return one batch with labels, the same in every run."""
    random = Random().manual_seed(1)
    special = SPECIAL.get(case.class_name) or SPECIAL.get(case.model_type) or (lambda random: {})
    return INPUTS.get(case.task, text_inputs)(random, model) | special(random)


def text_inputs(random: Random, model: PreTrainedModel) -> Inputs:
    labels = ids(random, LENGTH)
    labels[:, :3] = -100
    return {"input_ids": ids(random, LENGTH), "labels": labels}


def image_inputs(random: Random, model: PreTrainedModel) -> Inputs:
    labels = torch.randint(0, model.config.num_labels, (BATCH,), generator=random)
    if model.main_input_name == "input_ids":  # pixels are tokens
        return {"input_ids": ids(random, LENGTH), "labels": labels}
    size = getattr(model.config, "image_size", IMAGE)
    size = size if isinstance(size, int) else size[0]
    return {"pixel_values": noise(random, getattr(model.config, "num_channels", 3), size, size), "labels": labels}


def image_text_inputs(random: Random, model: PreTrainedModel) -> Inputs:
    size = getattr(model.config.vision_config, "image_size", IMAGE)
    video = model.main_input_name == "pixel_values_videos"
    pixels = noise(random, *((2,) if video else ()), 3, size, size)
    name = "pixel_values_videos" if video else "pixel_values"
    return {"input_ids": ids(random, LENGTH), name: pixels, "return_loss": True}


def speech_inputs(random: Random, model: PreTrainedModel) -> Inputs:
    text, name, config = text_inputs(random, model), model.main_input_name, model.config
    if name == "input_ids":  # it reads text, and takes speech where it gets any
        return text
    if name in ("inputs", "input_values"):
        return {"input_values": noise(random, 8000), "labels": text["labels"]}
    mel = found(config, ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"), 80)
    shape = (2 * getattr(config, "max_source_positions", 64), mel)
    return {name: noise(random, *(shape[::-1] if "whisper" in config.model_type else shape)), "labels": text["labels"]}


def ctc_inputs(random: Random, model: PreTrainedModel) -> Inputs:
    speech = speech_inputs(random, model) | {"labels": ids(random, 8, high=LETTERS)}
    if "input_features" in speech:  # some take the lengths from the mask alone
        speech["attention_mask"] = torch.ones(speech["input_features"].shape[:2], dtype=torch.long)
    return speech


def found(config: PretrainedConfig, names: tuple[str, ...], default: int) -> int:
    """Return the first of the fields that the config or one of its sub-configs has."""
    places = [config, *(child for child in vars(config).values() if isinstance(child, PretrainedConfig))]
    return next((getattr(place, name) for place in places for name in names if hasattr(place, name)), default)


VISION = {"image-classification": image_inputs, "image-text": image_text_inputs}
INPUTS = VISION | {"ctc": ctc_inputs, "speech-seq2seq": speech_inputs}
PATCHES = (IMAGE // PATCH) ** 2
SPECIAL: dict[str, Callable[[Random], Inputs]] = {  # on top of those, by model type or class; 4, 9 and 32 codebooks
    "musicgen": lambda r: {"input_ids": ids(r, 4, LENGTH, high=64).flatten(0, 1), "labels": ids(r, LENGTH, 4, high=64)},
    "dia": lambda r: {"decoder_input_ids": ids(r, LENGTH, 9), "labels": ids(r, 9, LENGTH).flatten(0, 1)},
    "kyutai_speech_to_text": lambda r: {"input_ids": ids(r, LENGTH, 1 + 32, high=64)},
    "git": lambda r: {"pixel_values": noise(r, 3, IMAGE, IMAGE)},
    "siglip2": lambda r: {
        "pixel_values": noise(r, PATCHES, 3 * PATCH**2),
        "pixel_attention_mask": torch.ones(BATCH, PATCHES, dtype=torch.long),
        "spatial_shapes": torch.full((BATCH, 2), IMAGE // PATCH),
    },
    "PerceiverForMaskedLM": lambda r: {"input_ids": ids(r, 128), "labels": ids(r, 128)},  # it pads to its full length
    "granite_speech5_ctc": lambda r: {"input_features": noise(r, 128, 4 * 80)},  # four frames together
    "voxtral_realtime": lambda r: {"input_features": noise(r, 128, 8 * LENGTH)},  # eight frames to a token
}
SPECIAL["musicgen_melody"] = SPECIAL["musicgen"]
