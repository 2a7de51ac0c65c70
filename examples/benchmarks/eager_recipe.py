"""The recipe of guides to long contexts, in eager mode: a peer of `longest.py` and `fsdp.py`.

Inputs of layers go to pinned memory of the host and come back in backward; MLPs run in tiles of 16,384 tokens, as TRL's
guide has them, and the loss in chunks of 2,048, which backward makes again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Run = Callable[..., torch.Tensor]
LOSS_CHUNK, MLP_TILE = 2048, 16384
"""Tokens."""


def sum_over_chunks(run: Callable[..., torch.Tensor], head: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of what `run` gives for each chunk of tokens; backward makes the logits of each chunk again."""
    parts = zip(x.split(LOSS_CHUNK, 1), labels.split(LOSS_CHUNK, 1), strict=True)
    return torch.stack([checkpoint(run, head, *part, use_reentrant=False) for part in parts]).sum()


def tiled_layer(layer: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """A layer whose MLP runs tile by tile; backward makes each tile again."""
    normed = layer.input_layernorm(x)
    out, _ = layer.self_attn(hidden_states=normed, position_embeddings=(cos, sin), attention_mask=None)
    x = x + out

    def mlp(tile: torch.Tensor) -> torch.Tensor:
        return tile + layer.mlp(layer.post_attention_layernorm(tile))

    return torch.cat([checkpoint(mlp, tile, use_reentrant=False) for tile in x.split(MLP_TILE, 1)], 1)


class OnHost(torch.autograd.Function):
    """A checkpoint that keeps its input in the memory of the host."""

    @staticmethod
    def forward(
        ctx, run: Callable[..., torch.Tensor], layer: nn.Module, x: torch.Tensor, *rest: torch.Tensor
    ) -> torch.Tensor:
        """Run the layer, while the copy goes out on a stream of its own."""
        ctx.run, ctx.device = partial(run, layer), x.device
        ctx.rest = rest
        ctx.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        if x.is_cuda:
            ctx.stream = copies()
            ctx.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(ctx.stream):
                ctx.host.copy_(x, non_blocking=True)
            x.record_stream(ctx.stream)
        else:
            ctx.host.copy_(x)
        return run(layer, x, *rest)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Run the layer again, and its backward."""
        if ctx.device.type == "cuda":
            torch.cuda.current_stream().wait_stream(ctx.stream)
        x = ctx.host.to(ctx.device, non_blocking=True).requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x, *ctx.rest)
        torch.autograd.backward(out, gradient)
        return None, None, x.grad, *[None] * len(ctx.rest)


_COPIES: list[Any] = []


def copies() -> Any:
    """The stream of all copies to the host."""
    if not _COPIES:
        _COPIES.append(torch.cuda.Stream())
    return _COPIES[0]
