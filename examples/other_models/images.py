"""Models of images, with and without texts, of other packages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch

from other_models.case import (
    BATCH,
    CLASSES,
    DENSE,
    HEADS,
    HIDDEN,
    IMAGE,
    LAYERS,
    PATCH,
    VOCAB,
    Built,
    OtherCase,
    Trained,
    classifier,
    tokens,
)


def image_cases() -> Iterator[OtherCase]:
    """Return the models of images of all packages, those that are not installed too."""
    for title, (module, cls, options) in TIMM.items():
        yield OtherCase("timm", title, partial(of_timm, module, cls, options), 0)
    for title, options in VIT_PYTORCH.items():
        yield OtherCase("vit_pytorch", title, partial(of_vit_pytorch, options), 0)
    yield OtherCase("open_clip", "clip", open_clip, 0)
    yield OtherCase("open_clip", "siglip", partial(open_clip, siglip=True), 0)
    yield OtherCase("open_clip", "coca", coca)


FLAT = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": HIDDEN, "depth": LAYERS, "num_classes": CLASSES}
VIT = FLAT | {"num_heads": HEADS}
FOUR = {"depths": (1, 1, 1, 1), "num_classes": CLASSES}
DIMS = (16, 32, 48, 64)
SWIN = {"img_size": 64, "embed_dim": 16, "num_heads": (1, 2, 4, 4), "window_size": 2} | FOUR
PIT = {"img_size": 64, "patch_size": 8, "stride": 8, "base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (1, 2, 4)}
PIT |= {"mlp_ratio": 4, "num_classes": CLASSES}
TIMM: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("vision_transformer", "VisionTransformer", VIT),
    "vit-swiglu": ("vision_transformer", "VisionTransformer", VIT | {"mlp_layer": "SwiGLU"}),
    "vit-packed-swiglu": ("vision_transformer", "VisionTransformer", VIT | {"mlp_layer": "GluMlp"}),
    "vit-layer-scale": ("vision_transformer", "VisionTransformer", VIT | {"init_values": 1e-1}),
    "vit-parallel-scaling": ("vision_transformer", "VisionTransformer", VIT | {"block_fn": "ParallelScalingBlock"}),
    "vit-parallel-things": ("vision_transformer", "VisionTransformer", VIT | {"block_fn": "ParallelThingsBlock"}),
    "vit-diff": ("vision_transformer", "VisionTransformer", VIT | {"block_fn": "DiffParallelScalingBlock"}),
    "vit-relative": ("vision_transformer_relpos", "VisionTransformerRelPos", VIT),
    "vit-sam": ("vision_transformer_sam", "VisionTransformerSAM", VIT | {"window_size": 2}),
    "naflexvit": ("naflexvit", "create", {"model": "naflexvit_base_patch16_gap", "depth": 2, "size": 64}),
    "deit": ("deit", "VisionTransformerDistilled", VIT),
    "beit": ("beit", "Beit", VIT),
    "eva": ("eva", "Eva", VIT | {"swiglu_mlp": True}),
    "eva-scaled": ("eva", "Eva", VIT | {"swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False}),
    "cait": ("cait", "Cait", VIT),
    "xcit": ("xcit", "Xcit", VIT),
    "convit": ("convit", "ConVit", VIT | {"embed_dim": HIDDEN // HEADS}),
    "mixer": (
        "mlp_mixer",
        "MlpMixer",
        VIT_LIKE := {"num_blocks": LAYERS, **{k: v for k, v in FLAT.items() if k != "depth"}},
    ),
    "resmlp": ("mlp_mixer", "MlpMixer", VIT_LIKE | {"block_layer": "ResBlock", "mlp_ratio": 4}),
    "gmlp": (
        "mlp_mixer",
        "MlpMixer",
        VIT_LIKE | {"block_layer": "SpatialGatingBlock", "mlp_ratio": 6, "mlp_layer": "GatedMlp"},
    ),
    "swin": ("swin_transformer", "SwinTransformer", SWIN),
    "swin2": ("swin_transformer_v2", "SwinTransformerV2", SWIN),
    "swin2-cr": ("swin_transformer_v2_cr", "SwinTransformerV2Cr", SWIN),
    "convnext": ("convnext", "ConvNeXt", FOUR | {"dims": DIMS}),
    "convnext-convs": ("convnext", "ConvNeXt", FOUR | {"dims": DIMS, "conv_mlp": True}),
    "convnext2": ("convnext", "ConvNeXt", FOUR | {"dims": DIMS, "use_grn": True, "ls_init_value": None}),
    "metaformer": ("metaformer", "MetaFormer", FOUR | {"dims": DIMS}),
    "caformer": ("metaformer", "create", {"model": "caformer_s18", "size": 64}),
    "mambaout": ("mambaout", "MambaOut", FOUR | {"dims": DIMS}),
    "inception-next": ("inception_next", "MetaNeXt", FOUR | {"dims": (16, 32, 48, 64)}),
    "focalnet": ("focalnet", "FocalNet", FOUR | {"embed_dim": 16}),
    "rdnet": ("rdnet", "create", {"model": "rdnet_tiny"}),
    "twins": ("twins", "Twins", FOUR | {"img_size": 64, "embed_dims": DIMS, "num_heads": (1, 2, 4, 4)}),
    "pvt2": ("pvt_v2", "PyramidVisionTransformerV2", FOUR | {"embed_dims": DIMS, "num_heads": (1, 2, 4, 4)}),
    "davit": ("davit", "DaVit", FOUR | {"embed_dims": DIMS, "num_heads": (1, 2, 4, 4), "window_size": 2}),
    "hiera": (
        "hiera",
        "Hiera",
        {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1), "num_classes": CLASSES},
    ),
    "nest": (
        "nest",
        "Nest",
        {
            "img_size": 64,
            "embed_dims": (16, 32, 64),
            "num_heads": (1, 2, 4),
            "depths": (1, 1, 1),
            "num_classes": CLASSES,
        },
    ),
    "tnt": ("tnt", "TNT", FLAT | {"inner_dim": 16, "num_heads_inner": 2, "num_heads_outer": HEADS}),
    "volo": ("volo", "create", {"model": "volo_d1_224", "img_size": 64}),
    "crossvit": ("crossvit", "create", {"model": "crossvit_tiny_240", "depth": ((1, 1, 0), (1, 1, 0))}),
    "coat": (
        "coat",
        "create",
        {"model": "coat_tiny", "serial_depths": (1, 1, 1, 1), "parallel_depth": 1, "img_size": 64},
    ),
    "levit": ("levit", "create", {"model": "levit_128s", "depth": (1, 1, 1)}),
    "mvit2": ("mvitv2", "create", {"model": "mvitv2_tiny", "size": 224}),
    "gcvit": ("gcvit", "create", {"model": "gcvit_xxtiny"}),
    "maxvit": ("maxxvit", "create", {"model": "test_coatnet", "size": 160}),
    "fastvit": ("fastvit", "create", {"model": "fastvit_t8", "layers": (1, 1, 1, 1), "size": 64}),
    "edgenext": ("edgenext", "create", {"model": "edgenext_xx_small", "depths": (1, 1, 1, 1), "size": 64}),
    "efficientformer2": ("efficientformer_v2", "create", {"model": "efficientformerv2_s0", "depths": (1, 1, 1, 1)}),
    "mobilevit": ("mobilevit", "create", {"model": "mobilevit_xxs", "size": 64}),
    "pit": ("pit", "PoolingVisionTransformer", PIT),
    "tiny-vit": ("tiny_vit", "create", {"model": "tiny_vit_5m_224", "depths": (1, 1, 1, 1)}),
    "starnet": ("starnet", "create", {"model": "starnet_s050", "depths": (1, 1, 1, 1), "size": 64}),
    "efficientnet": ("efficientnet", "create", {"model": "test_efficientnet", "size": 64}),
    "resnet": ("resnet", "create", {"model": "test_resnet", "size": 64}),
    "visformer": ("visformer", "create", {"model": "visformer_tiny", "depth": (1, 1, 1)}),
    "swiftformer": ("swiftformer", "create", {"model": "swiftformer_xs", "layers": (1, 1, 1, 1), "size": 64}),
    "sequencer": ("sequencer", "create", {"model": "sequencer2d_s", "layers": (1, 1, 1, 1)}),
}
WHERE = {"Mlp": "timm.layers", "SwiGLU": "timm.layers", "GluMlp": "timm.layers", "GatedMlp": "timm.layers"}


def of_timm(module: str, cls: str, options: dict[str, Any]) -> Built:
    """Return a classifier: a class with small sizes, or the smallest model of a family."""
    import timm

    options = dict(options)
    if cls == "create":
        size = options.pop("size", None)
        model = timm.create_model(options.pop("model"), num_classes=CLASSES, drop_path_rate=0.0, **options)
        return classifier(model, size or options.get("img_size") or model.default_cfg["input_size"][-1])
    place = import_module(f"timm.models.{module}")
    for name in ("mlp_layer", "block_layer", "block_fn", "token_mixers"):
        if name in options:
            options[name] = getattr(import_module(WHERE.get(options[name], place.__name__)), options[name])
    return classifier(getattr(place, cls)(**options), options.get("img_size", 64))


SQUARE = {"image_size": IMAGE, "patch_size": PATCH, "num_classes": CLASSES, "dim": HIDDEN}
DEEP = SQUARE | {"depth": LAYERS, "heads": HEADS, "mlp_dim": DENSE, "dim_head": HIDDEN // HEADS}
VIT_PYTORCH: dict[str, dict[str, Any]] = {
    "vit": DEEP,
    "simple_vit": DEEP,
    "deepvit": DEEP,
    "cait": DEEP | {"cls_depth": 1},
    "parallel_vit": DEEP | {"num_parallel_branches": 2},
    "vit_with_patch_merger": DEEP | {"patch_merge_layer": 0, "patch_merge_num_tokens": 8},
    "simple_vit_with_register_tokens": DEEP,
    "simple_vit_with_value_residual": DEEP,
    "simple_vit_with_hyper_connections": DEEP | {"num_residual_streams": 2},
    "simple_vit_with_qk_norm": DEEP,
    "normalized_vit": {k: v for k, v in DEEP.items() if k != "num_classes"} | {"num_classes": CLASSES},
    "vit_with_decorr": DEEP,
    "vit_with_keel_post_ln": DEEP,
    "look_vit": {k: v for k, v in DEEP.items() if k != "mlp_dim"} | {"highres_patch_size": 4},
    "jumbo_vit": DEEP,
    "vit_5": DEEP,
    "rvt": DEEP,
    "xcit": DEEP | {"cls_depth": 1},
}


def of_vit_pytorch(options: dict[str, Any]) -> Built:
    title = next(name for name, given in VIT_PYTORCH.items() if given is options)
    place = import_module(f"vit_pytorch.{title}")
    names = [
        name for name, value in vars(place).items() if isinstance(value, type) and value.__module__ == place.__name__
    ]
    cls = next(
        name
        for name in reversed(names)
        if "vit" in name.lower() or "cit" in name.lower() or "cait" in name.lower() or name == "RvT"
    )
    model = getattr(place, cls)(**options)

    def loss(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = model(images)
        return torch.nn.functional.cross_entropy(out[0] if isinstance(out, tuple) else out, labels)

    return Trained(model, loss), classifier(model)[1]


VISION = {"layers": LAYERS, "width": HIDDEN, "head_width": HIDDEN // HEADS, "image_size": IMAGE, "patch_size": PATCH}
TEXT = {"context_length": 16, "vocab_size": VOCAB, "width": HIDDEN, "heads": HEADS, "layers": LAYERS}


def pairs(length: int = 16) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(BATCH, 3, IMAGE, IMAGE), "text": tokens(BATCH, length)}


def open_clip(siglip: bool = False) -> Built:
    from open_clip import CLIP
    from open_clip.loss import ClipLoss, SigLipLoss

    extra = {"init_logit_bias": -10.0} if siglip else {}
    model = CLIP(embed_dim=HIDDEN, vision_cfg=VISION, text_cfg=TEXT, output_dict=True, **extra)
    loss_fn = SigLipLoss() if siglip else ClipLoss()

    def loss(model: torch.nn.Module, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return loss_fn(**model(image, text))

    return Trained(model, loss), pairs()


def coca() -> Built:
    from open_clip import CoCa, CoCaLoss

    text = TEXT | {"embed_cls": True, "output_tokens": True, "context_length": 15}
    vision = VISION | {"attentional_pool": True, "attn_pooler_heads": HEADS, "output_tokens": True}
    decoder = TEXT | {"mlp_ratio": 4, "context_length": 15}
    model = CoCa(embed_dim=HIDDEN, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision)
    torch.nn.init.normal_(model.text_decoder.text_projection, std=HIDDEN**-0.5)  # which nothing else sets
    loss_fn = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)

    def loss(model: torch.nn.Module, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return sum(loss_fn(**model(image, text)))

    return Trained(model, loss), pairs(15)
