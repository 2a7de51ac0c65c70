"""Who trains in `fsdp.py`: one sharded model whose layers and head are run by one method or another.

The weights are the same for all, so that methods can take turns in one process. FSDP's hooks stand around `Layer` and
`Head`; what a method does stays inside of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from longest import LAYER_CHUNK, checkpointed_layer, decoder_layer
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint
from train_fsdp import Ranks, compiles_checkpoints, shard, tensor_plan, use_ulysses
from train_lm import Preset, build_model

import mst_fx

METHODS = ("torch.compile", "mst_fx", "eager recipe")
LOSS_CHUNK, MLP_TILE = 2048, 16384
"""Tokens of the eager recipe: of the loss as in a chunked loss by hand, of the MLPs as TRL's guide has them."""

Run = Callable[..., torch.Tensor]


class Layer(nn.Module):
    """A decoder layer; `run` is the method's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.run: Run = decoder_layer

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        """Run the layer on hidden states and rotary embeddings."""
        return self.run(self.layer, *given)


class Head(nn.Module):
    """The last norm, the head and the loss; `run` is the method's."""

    def __init__(self, norm: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.norm, self.head = norm, head
        self.run: Run = sum_of_losses

    def forward(self, x: torch.Tensor, labels: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Give this rank's part of the mean loss."""
        return self.run(self, x, labels) / count


class Sharded(nn.Module):
    """A Llama in shards, and what each method makes of its parts.

    Args:
        preset: its sizes.
        device: of this rank.
        ranks: that share it.
        dynamic: whether one compile serves every length.
        chunk_tokens: of the MLPs' loops.
    """

    def __init__(
        self, preset: Preset, device: torch.device, ranks: Ranks, *, dynamic: bool, chunk_tokens: int = LAYER_CHUNK
    ) -> None:
        super().__init__()
        whole = build_model(preset, device).train()
        if ranks.way == "sequence":
            use_ulysses(whole.config, ranks.group)
        self.embed, self.rotary = whole.model.embed_tokens, whole.model.rotary_emb
        self.layers = nn.ModuleList(Layer(layer) for layer in whole.model.layers)
        self.head = Head(whole.model.norm, whole.lm_head)
        for each in self.layers:
            if ranks.way == "tensor":
                parallelize_module(each.layer, ranks.group, tensor_plan())
            shard(each, ranks.data if ranks.way == "tensor" else ranks.all)
        for part in (self.embed, self.head, self):
            shard(part, ranks.all)
        inside = compiles_checkpoints(ranks.way)
        self.runs = {name: runs(name, inside, dynamic, chunk_tokens) for name in METHODS}

    def use(self, method: str) -> None:
        """Let a method run layers and head."""
        layer, self.head.run = self.runs[method]
        for each in self.layers:
            each.run = layer

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        """Give this rank's part of the mean loss."""
        x = self.embed(input_ids)
        cos, sin = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(x, labels, count)


def runs(method: str, inside: bool, dynamic: bool, chunk_tokens: int) -> tuple[Run, Run]:
    """What a method runs in place of a layer and of the head with its loss.

    Args:
        method: one of `METHODS`.
        inside: whether layers are compiled with their checkpointing; it stands around the compiled layer otherwise.
        dynamic: as `torch.compile` has it.
        chunk_tokens: of the MLPs' loops.
    """
    if method == "eager recipe":
        return partial(OnHost.apply, tiled_layer), chunked_losses

    def compiled(fn: Run, **options: Any) -> Run:
        looped = {"backend": mst_fx.backend, "options": {"min_bytes": 0, "strict": True, **options}}
        return torch.compile(fn, dynamic=dynamic, fullgraph=True, **(looped if method == "mst_fx" else {}))

    head = compiled(sum_of_losses)
    if inside:
        return compiled(checkpointed_layer, chunk_tokens=chunk_tokens), head
    return partial(checkpoint, compiled(decoder_layer, chunk_tokens=chunk_tokens), use_reentrant=False), head


def sum_of_losses(head: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = head.head(head.norm(x)).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


# The eager recipe


def chunked_losses(head: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same, chunk by chunk; backward makes the logits of each chunk again."""
    parts = zip(x.split(LOSS_CHUNK, 1), labels.split(LOSS_CHUNK, 1), strict=True)
    return torch.stack([checkpoint(sum_of_losses, head, *part, use_reentrant=False) for part in parts]).sum()


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
    def forward(ctx, run: Run, layer: nn.Module, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
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
