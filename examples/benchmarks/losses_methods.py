"""Who is compared: compilers, which are given the loss as it is written, and libraries with functions of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from losses_rows import IGNORED, Loss

OWN_FORMULA = "~"
"""Marks a library's loss whose formula is another one."""


def compilers(loss: Loss) -> dict[str, Loss]:
    chunker = {"auto_chunker.enable": True, "auto_chunker.amplify_ratio_threshold": 1, "auto_chunker.num_chunk": 8}
    return {
        "torch.compile": torch.compile(loss),
        "mst_fx": torch.compile(loss, backend="mst_fx", options={"strict": True, "chunk_tokens": 1024, "min_bytes": 0}),
        "auto_chunker": torch.compile(loss, options=chunker),
    }


def liger() -> dict[str, Loss]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as Fused

    def fused(**options: Any) -> Loss:
        return lambda x, w, y: Fused(**options)(w, x.flatten(0, 1), y.flatten())

    def cut(x, w, y):
        return Fused()(w, x[:, :-1].flatten(0, 1), y[:, 1:].flatten())

    def second(x, w, y):
        return cut(x, w, y) + 0.3 * Fused()(w, x[:, :-2].tanh().flatten(0, 1), y[:, 2:].flatten())

    def weighted(x, w, y):
        weight = torch.linspace(0.5, 1.5, w.shape[0], device=x.device)
        return Fused(ce_weight=weight)(w, x.flatten(0, 1), y.flatten())

    def policy(x, w, y):
        advantages = torch.linspace(-0.5, 1, len(y), device=x.device)
        mask = (y[:, 1:] % 4 != 0).float()
        return LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(x[:, :-1], w, y[:, 1:], mask, advantages)[0]

    def preference(x, w, y):
        return LigerFusedLinearDPOLoss(beta=1e-3)(w, x[:, :-1], y[:, 1:], None, x[:, :-1] * 0.9, w)[0]

    def divergence(x, w, y):
        x = x.flatten(0, 1)
        return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)(x, w, x * 0.9, w, y.flatten())

    return {
        "cross-entropy": fused(),
        "sum / num_items_in_batch": lambda x, w, y: fused(reduction="sum")(x, w, y) / (y != IGNORED).sum(),
        "label smoothing": fused(label_smoothing=0.1),
        "class weights": weighted,
        "soft-cap": fused(softcap=30.0),
        "z-loss": fused(lse_square_scale=1e-4),
        "shift by slicing the logits": cut,
        "log-probabilities of tokens": lambda x, w, y: -fused(reduction="none")(x, w, y).view_as(y),
        "GRPO, clipped, with a mask": policy,
        "DPO with a reference head" + OWN_FORMULA: preference,
        "distillation: Jensen-Shannon" + OWN_FORMULA: divergence,
        "two heads (multi-token prediction)": second,
    }


def cut_cross_entropy() -> dict[str, Loss]:
    from cut_cross_entropy import linear_cross_entropy as fused

    return {
        "cross-entropy": fused,
        "sum / num_items_in_batch": lambda x, w, y: fused(x, w, y, reduction="sum") / (y != IGNORED).sum(),
        "soft-cap": lambda x, w, y: fused(x, w, y, softcap=30.0),
        "shift by slicing the logits": lambda x, w, y: fused(x, w, y, shift=1),
        "log-probabilities of tokens": lambda x, w, y: -fused(x, w, y, reduction="none"),
        "two heads (multi-token prediction)": lambda x, w, y: (
            fused(x, w, y, shift=1) + 0.3 * fused(x[:, :-2].tanh().contiguous(), w, y[:, 2:].contiguous())
        ),
    }


def linear_cross_entropy() -> dict[str, Loss]:
    fused = F.linear_cross_entropy  # torch 2.13 and newer

    def call(x, w, y, **options: Any):
        chunked = torch.nn.LinearCrossEntropyOptions()
        return fused(x.flatten(0, 1), w, y.flatten(), options=chunked, **options)

    def weighted(x, w, y):
        return call(x, w, y, weight=torch.linspace(0.5, 1.5, w.shape[0], device=x.device, dtype=x.dtype))

    return {
        "cross-entropy": call,
        "sum / num_items_in_batch": lambda x, w, y: call(x, w, y, reduction="sum") / (y != IGNORED).sum(),
        "label smoothing": lambda x, w, y: call(x, w, y, label_smoothing=0.1),
        "class weights": weighted,
        "shift by slicing the logits": lambda x, w, y: call(x[:, :-1], w, y[:, 1:]),
        "log-probabilities of tokens": lambda x, w, y: -call(x, w, y, reduction="none").view_as(y),
        "two heads (multi-token prediction)": lambda x, w, y: (
            call(x[:, :-1], w, y[:, 1:]) + 0.3 * call(x[:, :-2].tanh(), w, y[:, 2:])
        ),
    }


LIBRARIES = {"Liger": liger, "cut-cross-entropy": cut_cross_entropy, "F.linear_cross_entropy": linear_cross_entropy}
METHODS = ("torch.compile", "mst_fx", "auto_chunker", *LIBRARIES)
