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
from eager_recipe import OnHost, sum_over_chunks, tiled_layer
from longest import LAYER_CHUNK, checkpointed_layer, decoder_layer
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint
from train_fsdp import Ranks, compiles_checkpoints, shard, tensor_plan, use_ulysses
from train_lm import Preset, build_model

import mst_fx

METHODS = ("torch.compile", "mst_fx", "eager recipe")
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
        return partial(OnHost.apply, tiled_layer), partial(sum_over_chunks, sum_of_losses)

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
