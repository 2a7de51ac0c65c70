"""Attention on the device "meta", which has no kernels: the op that a GPU would run in its place.

A model is explained on shapes alone where its tensors are there. torch decomposes attention into products there, as no
device would that has a kernel for it; then the scores would exist, and there would be no attention to loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from mst_fx.core.aten_ops import aten
from mst_fx.core.sizes import sure
from mst_fx.core.values import HALF

SPELLINGS = (
    F.scaled_dot_product_attention,
    aten.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
)
NAME = F.scaled_dot_product_attention.__name__
MOST_FEATURES = 256
"""The longest heads that flash attention takes."""


class AttentionOfGpu(TorchFunctionMode):
    """Runs attention on the device "meta" as a GPU would: by one kernel, if one of them takes these operands."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch."""
        if func in SPELLINGS:
            func = _attention
        elif isinstance(func, FunctionType) and NAME in func.__code__.co_names:
            func = _with_attention(func)
        return func(*args, **(kwargs or {}))


def _with_attention(function: FunctionType) -> Callable[..., Any]:
    """Return a function of Python that calls attention (`F.multi_head_attention_forward`), with ours in its place."""
    globals_of = {**function.__globals__, NAME: _attention}
    copy = FunctionType(function.__code__, globals_of, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    operands = (query, key, value)
    on_meta = query.device.type == "meta" and all(x.dim() == 4 for x in operands)
    if on_meta and attn_mask is None and _is_for_flash(query, key, value, is_causal):
        flash = aten._scaled_dot_product_flash_attention.default
        made: tuple[torch.Tensor, ...] = flash(*operands, dropout_p, is_causal, scale=scale)
        return made[0]
    if on_meta and _is_for_efficient(query, key):
        bias = _bias(attn_mask, query, key)
        efficient = aten._scaled_dot_product_efficient_attention.default
        made = efficient(*operands, bias, True, dropout_p, is_causal, scale=scale)
        return made[0]
    return F.scaled_dot_product_attention(
        *operands, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _is_for_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> bool:
    """Return whether a GPU's flash attention takes these operands, without a mask; keys may have fewer heads."""
    features = {x.shape[3] for x in (query, key, value)}
    square = sure(query.shape[2] == key.shape[2]) or not is_causal
    fits = len(features) == 1 and all(sure(size <= MOST_FEATURES) for size in features)
    return torch.backends.cuda.flash_sdp_enabled() and query.dtype in HALF and fits and square


def _is_for_efficient(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Return whether a GPU's memory-efficient attention takes these operands; it takes any mask."""
    known = query.dtype in (*HALF, torch.float32)
    return torch.backends.cuda.mem_efficient_sdp_enabled() and known and sure(query.shape[1] == key.shape[1])


def _bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return what memory-efficient attention adds to the scores of a mask: a number for each query, key and head."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        seen, hidden = (mask.new_full((), number, dtype=query.dtype) for number in (0.0, -math.inf))
        mask = torch.where(mask, seen, hidden)
    return mask.expand(*query.shape[:3], key.shape[2])
