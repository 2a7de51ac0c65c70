"""Programs of several ranks: DDP in its forms, parts that are fully sharded, and sequences that ranks share."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from frugal import frugal
from parallel import (
    FF,
    GROUPS,
    TOKENS,
    Block,
    Counting,
    D,
    Model,
    Outcome,
    V,
    Way,
    batches,
    errors_of,
    gradients_of,
    outcome,
    truth_of,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import context_parallel, register_sharding
from torch.nn.parallel import DistributedDataParallel
from ulysses import SPELLINGS, by_torch

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
    dynamic: bool | None = None,
    one_by_one: bool = False,
    unused: bool = False,
    groups: int = GROUPS,
    options: Mapping[str, Any] = MappingProxyType({}),
    **of_steps: Any,
) -> Found:
    """Steps of a model in DDP.

    Args:
        way: how to compile.
        optimize: Dynamo's option `optimize_ddp`.
        model: makes the model.
        dynamic: of `torch.compile`.
        one_by_one: compile blocks and head by themselves, and not all in one.
        unused: a parameter gets no gradient.
        groups: of heads.
        options: of DDP.
        **of_steps: as for `steps`.
    """
    own = model().double()
    if unused:
        own.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    truth = _copy(own)
    how = way.given(head_groups=groups)
    with torch._dynamo.config.patch(optimize_ddp=optimize, compiled_autograd=optimize == "python_reducer"):
        wrapped = DistributedDataParallel(own, **options)
        for part in (*own.blocks, own.head) if one_by_one else ():
            part.compile(**how)
        run = wrapped if one_by_one else torch.compile(wrapped, dynamic=dynamic, **how)
        return steps(truth, wrapped, run, **of_steps)


def fsdp(
    way: Way,
    mesh: tuple[int, ...] = (),
    checkpointed: str = "",
    reshard: bool = True,
    offload: bool = False,
    mixed: bool = False,
    attention: Callable[..., torch.Tensor] = F.scaled_dot_product_attention,
    whole: bool = False,
    to_host: bool = False,
    **of_steps: Any,
) -> Found:
    """Steps of a model of which each part is fully sharded.

    Args:
        way: how to compile.
        mesh: sizes of the mesh: with two, the first are copies.
        checkpointed: "inside" of a compiled block, or "outside" of it.
        reshard: let go of whole parameters behind the forward.
        offload: parameters lie on the host.
        mixed: whole parameters are bfloat16, and gradients are added up in float32.
        attention: of q, k and v.
        whole: compile all at once: Dynamo ends a graph where a part is gathered. Otherwise each part by itself.
        to_host: what checkpoints keep is on the host between forward and backward.
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
    how = way.given(**({"offload": "checkpoints"} if to_host else {}))
    for part in (*own.blocks, own.head):
        if not whole:
            part.compile(**how)
        fully_shard(part, **options)
    wrapped = fully_shard(own, **options)
    return steps(truth, wrapped, torch.compile(wrapped, **how) if whole else wrapped, **of_steps)


def context_parallel_ddp(way: Way) -> Found:
    """A step within torch's `context_parallel`, which gives each rank its tokens and makes DTensors of q, k and v.

    On a CPU, torch has no ring attention: a rule of how DTensors are placed stands in for it, with whole k and v.
    """
    _attend_to_whole_keys()
    own = Model().double()
    truth = _copy(own)
    own.blocks[0].attention = lambda q, k, v: F.scaled_dot_product_attention(q, k, v)  # torch replaces it by then
    wrapped = DistributedDataParallel(own)
    run, mesh = torch.compile(wrapped, **way.given()), init_device_mesh("cpu", (dist.get_world_size(),))
    (batch,) = batches([TOKENS], seed=0)
    expected = truth_of(truth, [batch])
    around = context_parallel(mesh, buffers=list(batch), buffer_seq_dims=[1, 1])
    with torch._dynamo.config.patch(optimize_ddp=False), around, Counting() as count:
        loss, shown = run(*batch)
        loss.backward()
    return errors_of({"loss": shown, **gradients_of(wrapped)}, expected), count.found


@cache
def _attend_to_whole_keys() -> None:
    own, whole = Shard(2), Replicate()

    @register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    def _forward(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        return [([own, own], [own, whole, whole])]

    @register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
    def _backward(grad, q, k, v, out, sums, dropout_p, is_causal, *, attn_mask=None, scale=None):
        return [([own, Partial(), Partial()], [own, own, whole, whole, own, own, None, None])]


def ulysses_fsdp(way: Way) -> Found:
    """Two ranks share a sequence, other ranks have others of other lengths; all of them share the parameters."""
    groups = [dist.new_group([rank, rank + 1]) for rank in range(0, dist.get_world_size(), 2)]
    attention = by_torch(groups[dist.get_rank() // 2])
    return fsdp(way, attention=attention, checkpointed="inside", sharing=2, lengths=lambda _, number: 24 + 12 * number)


def spelled(way: Way) -> Found:
    """Two ranks share a sequence; each block exchanges heads in other words."""

    def model() -> Model:
        spellings = [each for each in SPELLINGS.values() if each is not by_torch]
        made = Model(blocks=len(spellings))
        for block, spelling in zip(made.blocks, spellings, strict=True):
            block.attention = spelling(dist.group.WORLD)
        return made

    return ddp(way, model=model, sharing=2)


class _Last(nn.Module):
    """The stage that ends in logits."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(FF), nn.Linear(D, V, bias=False)

    def forward(self, x):
        return self.head(self.block(x))


def pipeline(way: Way) -> Found:
    """Two stages, each compiled by itself; the first one's gradients come from the second one."""
    stages = [Block(FF).double(), _Last().double()]
    own, rank = copy.deepcopy(stages[dist.get_rank()]), dist.get_rank()
    x, labels = torch.randn(4, TOKENS, D, dtype=torch.float64), torch.randint(0, V, (4, TOKENS))

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    loss_of(nn.Sequential(*stages)(x), labels).backward()
    own.compile(**way.given())
    stage = PipelineStage(own, rank, 2, torch.device("cpu"))
    schedule, given = Schedule1F1B(stage, n_microbatches=2, loss_fn=loss_of), {"target": labels} if rank else {}
    with Counting() as count:
        schedule.step(*() if rank else (x,), **given)
    found: list[Any] = [None, None]
    dist.all_gather_object(found, errors_of(gradients_of(own), gradients_of(stages[rank])))
    return {
        f"{stage}, {name}": error for stage, errors in enumerate(found) for name, error in errors.items()
    }, count.found


def _wide() -> Model:
    """A model with checkpointed blocks, of which each parameter of the MLP fills a bucket of DDP."""
    model = Model(8192)
    model.blocks[0].checkpointed = True
    return model


PROGRAMS: dict[int, dict[str, Callable[[Way], Found]]] = {
    2: {
        "ddp, no_sync": partial(ddp, accumulate=2),
        "ddp, static graph, other lengths on each rank": partial(
            ddp,
            dynamic=True,
            groups=1,
            options={"static_graph": True},
            lengths=lambda step, number: 16 + 8 * number + 4 * step,
        ),
        "ddp, parts, unused parameter": partial(
            ddp, one_by_one=True, unused=True, options={"find_unused_parameters": True}
        ),
        "ddp, python reducer": partial(ddp, optimize="python_reducer"),
        "ddp, divided between checkpointed blocks": partial(
            ddp, optimize=True, model=_wide, options={"bucket_cap_mb": 1}
        ),
        "fsdp, checkpoint outside, offloaded": partial(fsdp, checkpointed="outside", offload=True),
        "fsdp, mixed precision, all at once": partial(fsdp, mixed=True, whole=True),
        "ulysses, in other words": spelled,
        "context parallel": context_parallel_ddp,
        "pipeline": pipeline,
    },
    4: {
        "hsdp, checkpoint inside, not resharded, to the host": partial(
            fsdp, mesh=(2, 2), checkpointed="inside", reshard=False, to_host=True
        ),
        "ulysses in fsdp": ulysses_fsdp,
    },
}
"""By number of ranks, and by name."""


def outcomes() -> dict[str, Outcome]:
    """Run all programs for this number of ranks."""
    with frugal():
        return {name: outcome(program) for name, program in PROGRAMS[dist.get_world_size()].items()}


def _copy(model: Model) -> Model:
    copied = type(model)(model.blocks[0].gate.out_features, len(model.blocks)).to(model.head.weight.dtype)
    copied.load_state_dict(model.state_dict(), strict=False)
    return copied
