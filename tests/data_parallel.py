"""Programs of several ranks: DDP in its forms, parts that are fully sharded, and sequences that ranks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F  # noqa: N812
from parallel import TOKENS, Counting, Model, Way, batches, errors_of, gradients_of, truth_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

Found = tuple[dict[str, float], Counter[str]]
STEPS = 2


def steps(
    own: Model,
    wrapped: nn.Module,
    run: Callable[..., Any],
    lengths: Callable[[int, int], int] = lambda step, sequence: TOKENS,
    sharing: int = 1,
    accumulate: int = 1,
) -> Found:
    """The largest errors in some steps, and the collectives of the last one.

    Args:
        own: the model as it was before it was wrapped, of which the truth is made.
        wrapped: the model on several ranks.
        run: runs it.
        lengths: of the sequences, by step and number.
        sharing: number of ranks that share a sequence.
        accumulate: number of batches in a step; the ranks add up gradients after the last one.
    """
    rank, sequences = dist.get_rank(), dist.get_world_size() // sharing
    errors: dict[str, float] = {}
    for step in range(STEPS):
        wanted = [lengths(step, number) for number in range(sequences)]
        given = [batches(wanted, seed=10 * step + part) for part in range(accumulate)]
        truths = [truth_of(own, batch) for batch in given]
        truth = {name: sum(each[name] for each in truths) for name in truths[0]}
        wrapped.zero_grad()
        losses = []
        with Counting() as count:
            for number, batch in enumerate(given):
                ids, labels = (each.chunk(sharing, 1)[rank % sharing] for each in batch[rank // sharing])
                last = number == accumulate - 1
                with nullcontext() if last else wrapped.no_sync():
                    loss, shown = run(ids, labels)
                    loss.backward()
                losses.append(shown.double())
        found = errors_of({"loss": torch.stack(losses).sum(), **gradients_of(wrapped)}, truth)
        errors = {name: max(error, errors.get(name, 0.0)) for name, error in found.items()}
    return errors, count.found


def ddp(
    way: Way,
    optimize: Any = False,
    model: Callable[[], Model] = Model,
    one_by_one: bool = False,
    unused: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
    **of_steps: Any,
) -> Found:
    """Steps of a model in DDP.

    Args:
        way: how to compile.
        optimize: Dynamo's option `optimize_ddp`.
        model: makes the model.
        one_by_one: compile blocks and head by themselves, and not all in one.
        unused: a parameter gets no gradient.
        options: of DDP.
        **of_steps: as for `steps`.
    """
    own = model().double()
    if unused:
        own.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    truth = _copy(own)
    with torch._dynamo.config.patch(optimize_ddp=optimize, compiled_autograd=optimize == "python_reducer"):
        wrapped = DistributedDataParallel(own, **options)
        for part in (*own.blocks, own.head) if one_by_one else ():
            part.compile(**way.given)
        return steps(truth, wrapped, wrapped if one_by_one else torch.compile(wrapped, **way.given), **of_steps)


def fsdp(
    way: Way,
    mesh: tuple[int, ...] = (),
    checkpointed: str = "",
    reshard: bool = True,
    offload: bool = False,
    mixed: bool = False,
    attention: Callable[..., torch.Tensor] = F.scaled_dot_product_attention,
    **of_steps: Any,
) -> Found:
    """Steps of a model of which each part is fully sharded, and compiled by itself.

    Args:
        way: how to compile.
        mesh: sizes of the mesh: with two, the first are copies.
        checkpointed: "inside" of a compiled block, or "outside" of it.
        reshard: let go of whole parameters behind the forward.
        offload: parameters lie on the host.
        mixed: whole parameters are bfloat16, and gradients are added up in float32.
        attention: of q, k and v.
        **of_steps: as for `steps`.
    """
    own = Model() if mixed else Model().double()
    truth = _copy(own)
    own.checkpointed = checkpointed == "outside"
    options: dict[str, Any] = {"reshard_after_forward": reshard}
    if mixed:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    shape = mesh or (dist.get_world_size(),)
    options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
    for block in own.blocks:
        block.attention, block.checkpointed = attention, checkpointed == "inside"
    for part in (*own.blocks, own.head):
        part.compile(**way.given)
        fully_shard(part, **options)
    wrapped = fully_shard(own, **options)
    return steps(truth, wrapped, wrapped, **of_steps)


def exchanged(group: dist.ProcessGroup) -> Callable[..., torch.Tensor]:
    """Return attention of the ranks of a group that share a sequence: each has all tokens of some heads (Ulysses)."""
    ranks = group.size()

    def to_all(x: torch.Tensor) -> torch.Tensor:
        """Give each rank its part of dim 0."""
        sizes = [x.shape[0] // ranks] * ranks
        return funcol.all_to_all_single_autograd(x.contiguous(), sizes, sizes, group)

    def to_heads(x: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = x.shape
        parts = to_all(x.view(batch, ranks, heads // ranks, length, width).transpose(0, 1))
        return parts.permute(1, 2, 0, 3, 4).reshape(batch, heads // ranks, ranks * length, width)

    def to_tokens(x: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = x.shape
        parts = to_all(x.view(batch, heads, ranks, length // ranks, width).permute(2, 0, 1, 3, 4))
        return parts.transpose(0, 1).reshape(batch, ranks * heads, length // ranks, width)

    return lambda q, k, v: to_tokens(F.scaled_dot_product_attention(*map(to_heads, (q, k, v))))


def _copy(model: Model) -> Model:
    copied = type(model)(model.blocks[0].gate.out_features, len(model.blocks)).to(model.head.weight.dtype)
    copied.load_state_dict(model.state_dict(), strict=False)
    return copied
