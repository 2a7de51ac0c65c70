"""Train a Llama on several GPUs: FSDP2 gathers one part at a time, and mst_fx loops inside each part.

    torchrun --nproc-per-node 2 examples/train_fsdp.py                         # each rank trains on its own text
    torchrun --nproc-per-node 2 examples/train_fsdp.py --sequence-parallel 2   # two ranks share each text: Ulysses
    torchrun --nproc-per-node 2 examples/train_fsdp.py --context-parallel 2    # the same with ring attention; GPUs
    torchrun --nproc-per-node 2 examples/train_fsdp.py --tensor-parallel 2     # they share the weights of layers, too
    torchrun --nproc-per-node 8 examples/train_fsdp.py --sequence-parallel 8 --preset 8b-layer --layers 32

`accelerate launch --multi_gpu --num_processes 2 examples/train_fsdp.py` does the same. Without GPUs, ranks are
processes that talk through gloo. Nothing is downloaded; model and text are those of train_lm.py.

What matters for mst_fx is the size of the parts: a checkpointed layer is compiled by itself, since FSDP gathers its
weights before it runs, and so is the head, with the last norm and the loss. Ranks that share a text hold a slice of
its tokens each, in all but the inside of attention (and, tensor parallel, of the MLPs). So the labels are shifted
before the text is cut, and each rank divides the sum of its losses by the number of labels on all ranks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
import train_lm
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from tqdm import tqdm
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

import mst_fx

WAYS = ("tensor", "sequence", "context")


@dataclass(frozen=True)
class Ranks:
    """How the ranks share the work.

    Attributes:
        all: every rank.
        data: one rank of each text, those that have the same slice.
        group: the ranks that share a text.
        way: one of `WAYS` to share it, "" where each rank has its own.
    """

    all: DeviceMesh
    data: DeviceMesh
    group: DeviceMesh
    way: str = ""

    @classmethod
    def of(cls, device: torch.device, way: str = "", size: int = 1) -> Ranks:
        """Arrange all ranks in groups of a size."""
        world = dist.get_world_size()
        if world % size:
            raise SystemExit(f"{world} ranks are no multiple of --{way}-parallel {size}")
        grid = init_device_mesh(device.type, (world // size, size), mesh_dim_names=("data", "group"))
        return cls(init_device_mesh(device.type, (world,)), grid["data"], grid["group"], way)


# The model, in parts


class HeadAndLoss(nn.Module):
    """The last norm, the head and the loss: one part to gather and to compile, so that its logits stay inside."""

    def __init__(self, norm: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Return the sum of the losses of this rank's tokens, divided by the number of labels on all ranks."""
        logits = self.head(self.norm(hidden)).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count


class ModelAndLoss(nn.Module):
    """A causal language model of transformers that ends in its loss."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.body, self.head = model.model, HeadAndLoss(model.model.norm, model.lm_head)
        self.body.norm = nn.Identity()

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        """Return this rank's part of the mean loss."""
        out = self.body(input_ids=input_ids, position_ids=positions, use_cache=False)
        return self.head(out.last_hidden_state, labels, count)


def build_model(preset: train_lm.Preset, device: torch.device, ranks: Ranks, **how: Any) -> ModelAndLoss:
    """Build a model, compile its parts and shard them.

    Args:
        preset: its sizes. Every rank makes all weights, the same ones, and keeps its shard.
        device: of this rank.
        ranks: that share the parts.
        how: arguments of `compile`.
    """
    model = ModelAndLoss(train_lm.build_model(preset, device)).train()
    layers = model.body.layers
    for i, layer in enumerate(layers):
        if ranks.way == "tensor":
            parallelize_module(layer, ranks.group, tensor_plan())
        layers[i] = checkpoint_wrapper(layer)
        (layers[i] if compiles_checkpoints(ranks.way) else layer).compile(**how)
        shard(layers[i], ranks.data if ranks.way == "tensor" else ranks.all)
    model.head.compile(**how)
    for part in (model.head, model.body.embed_tokens, model):
        shard(part, ranks.all)
    if ranks.way == "sequence":
        use_ulysses(model.body.config, ranks.group)
    return model


def compiles_checkpoints(way: str) -> bool:
    """Whether layers are compiled with the checkpoints around them, or inside of them.

    In a checkpoint that it compiles, torch 2.11 saves what collectives give; 2.13 fails on DTensors. A checkpoint
    around a layer makes all of it again, and then the backward of a looped MLP recomputes as well: it takes longer.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= {"": (2, 11), "tensor": (2, 15)}.get(way, (2, 13))


def shard(part: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the weights over the ranks of a mesh; the gradients of the ranks add up."""
    sharded = fully_shard(part, mesh=mesh)
    assert isinstance(sharded, FSDPModule)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


# Three ways to share a text


def tensor_plan() -> dict[str, Any]:
    """Each rank has a part of the heads and of the MLP's features; between them it has a slice of the tokens."""
    all_tokens = {"hidden_states": Replicate()}
    return {
        "input_layernorm": SequenceParallel(use_local_output=True),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts=all_tokens
        ),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": SequenceParallel(use_local_output=True),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }


def use_ulysses(config: Any, group: DeviceMesh) -> None:
    """Register attention in which each rank has all tokens of a part of the heads, and choose it."""
    if config.num_key_value_heads % group.size():
        raise SystemExit(f"{config.num_key_value_heads} heads of keys are no multiple of {group.size()} ranks")

    def exchange(x: torch.Tensor, give: int, take: int) -> torch.Tensor:
        """Give each rank its part of one dim, and take all parts of another."""
        parts = x.unflatten(give, (group.size(), -1)).movedim(give, 0).contiguous()
        parts = all_to_all_single_autograd(parts, None, None, group.get_group())
        return parts.movedim(0, take).flatten(take, take + 1)

    def ulysses(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (exchange(x, give=1, take=2) for x in (query, key, value))
        out, _ = train_lm.causal_attention(module, query, key, value, mask, **options)
        return exchange(out, give=1, take=2), None

    AttentionInterface.register("ulysses", ulysses)
    AttentionMaskInterface.register("ulysses", lambda *args, **kwargs: None)
    config._attn_implementation = "ulysses"


@contextmanager
def slices(ids: torch.Tensor, ranks: Ranks) -> Iterator[dict[str, torch.Tensor]]:
    """The arguments of the model on this rank; forward and backward belong inside."""
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    count = (labels != -100).sum()
    dist.all_reduce(count)  # each text is counted by all of its ranks
    given = {"input_ids": ids, "positions": positions, "labels": labels, "count": count // ranks.group.size()}
    if ranks.way == "context":
        buffers = [ids, positions, labels]
        with context_parallel(ranks.group, buffers=buffers, buffer_seq_dims=[1] * 3, no_restore_buffers=set(buffers)):
            yield given
        return
    sliced = {"tensor": ("input_ids", "labels"), "sequence": ("input_ids", "positions", "labels")}.get(ranks.way, ())
    own = {name: given[name].chunk(ranks.group.size(), 1)[ranks.group.get_local_rank()] for name in sliced}
    yield {**given, **own}


# Training


def build_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    meshes = defaultdict(list)  # a fused step takes weights of one mesh
    for weight in model.parameters():
        meshes[weight.device_mesh].append(weight)
    groups = [{"params": weights} for weights in meshes.values()]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def timed_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, ranks: Ranks
) -> tuple[float, float]:
    """Run forward, backward and update; return the loss of all ranks, and seconds."""
    begin = time.perf_counter()
    with slices(ids, ranks) as given:
        loss = model(**given)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach()
    dist.all_reduce(total)
    return total.item(), time.perf_counter() - begin  # the loss waits for the device


class Trainer:
    """A sharded model and its optimizer.

    Attributes:
        losses: of all steps, over all ranks.
        seconds: of all steps.
    """

    def __init__(self, preset: train_lm.Preset, device: torch.device, ranks: Ranks, **how: Any) -> None:
        self.ranks = ranks
        self.model = build_model(preset, device, ranks, **how)
        self.optimizer = build_optimizer(self.model, preset.rate)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, ids: torch.Tensor) -> None:
        """Run forward, backward and update; record the loss and the time."""
        loss, seconds = timed_step(self.model, self.optimizer, ids, self.ranks)
        self.losses.append(loss)
        self.seconds.append(seconds)


def train(trainer: Trainer, preset: train_lm.Preset, device: torch.device) -> float:
    """Train for the steps of a preset, and for one more; return its peak in MiB, above weights and optimizer."""
    data = trainer.ranks.data
    texts = train_lm.batches(train_lm.read_text(), preset, device)
    own = islice(texts, data.get_local_rank(), None, data.size())
    tokens = data.size() * preset.batch * preset.length
    with tqdm(total=preset.steps, unit="step", disable=dist.get_rank() != 0) as bar:
        for step in range(preset.steps):
            bar.set_description("compiling" if step < train_lm.COMPILING_STEPS else "training")
            trainer.step(next(own))
            rate = f"{tokens / trainer.seconds[-1]:,.0f}"
            bar.set_postfix(loss=f"{trainer.losses[-1]:.3f}", tokens_a_second=rate, refresh=False)
            bar.update()
    return train_lm.peak_bytes(trainer.step, next(own)) / 2**20


def parse() -> tuple[train_lm.Preset, str, int, dict[str, Any]]:
    """Return the preset, the way to share a text and the number of ranks that do, and the options of mst_fx."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one = parser.add_mutually_exclusive_group()
    for way in WAYS:
        one.add_argument(f"--{way}-parallel", type=int, metavar="N", help="ranks that share a text")
    train_lm.add_arguments(parser)
    args = parser.parse_args()
    preset, options = train_lm.chosen(args)
    sizes = {way: getattr(args, f"{way}_parallel") or 1 for way in WAYS}
    way = max(sizes, key=lambda way: sizes[way])
    return preset, way if sizes[way] > 1 else "", sizes[way], options


def main() -> None:
    preset, way, size, options = parse()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks.of(device, way, size)
    trainer = Trainer(preset, device, ranks, backend=mst_fx.backend, options=options)
    peaks: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(peaks, train(trainer, preset, device))
    if dist.get_rank() == 0:
        seconds = statistics.median(trainer.seconds[train_lm.COMPILING_STEPS :])
        rate = ranks.data.size() * preset.batch * preset.length / seconds
        shared = f"{way} parallel, {size} ranks a text" if way else "a text for each rank"
        print(f"\n{preset}\non {len(peaks)} ranks ({device.type}), {shared}, torch {torch.__version__}\n")
        print(f"loss {trainer.losses[0]:.4f} -> {trainer.losses[-1]:.4f}")
        print(f"{seconds * 1e3:,.1f} ms a step (median), {rate:,.0f} tokens a second")
        print("peak of a step above weights and optimizer, MiB a rank:", *(f"{peak:,.1f}" for peak in peaks))
        print(f"\nlooped on rank 0:\n{mst_fx.summary()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
