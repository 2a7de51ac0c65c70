"""Heads over a vocabulary that ranks share, and what becomes of them on several ranks, beside one process."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F  # noqa: N812
from frugal import frugal
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import mst_fx
from mst_fx.predict.time import Device
from mst_fx.survey import surveyed

HIDDEN, TOKENS, CLASSES, CHUNKS = 16, 24, 64, 4
OPTIONS = {"min_bytes": 0, "num_chunks": CHUNKS, "strict": True, "verify": True}

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Head(nn.Module):
    """A norm, a projection to the classes, and a loss."""

    def __init__(self, loss: Loss, classes: int = CLASSES) -> None:
        super().__init__()
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, classes, bias=False)
        self.loss = loss

    def forward(self, x, labels):
        return self.loss(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def smoothed(logits, labels):
    weight = torch.linspace(0.5, 1.5, CLASSES, dtype=logits.dtype)
    return F.cross_entropy(logits, labels, weight, label_smoothing=0.1)


def with_z_loss(logits, labels):
    return F.cross_entropy(logits, labels) + 1e-2 * logits.logsumexp(-1).square().mean()


def log_probabilities(logits, labels):
    found = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(found.exp() * found).sum()


def summed(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=3)


def weighted(logits, labels):
    return F.cross_entropy(logits, labels, torch.linspace(0.5, 1.5, CLASSES, dtype=logits.dtype))


class CrossEntropyOfShards(torch.autograd.Function):
    """The cross-entropy of logits of which each rank has its classes, written by hand: three all-reduces."""

    @staticmethod
    def forward(ctx, logits, labels, group):
        first = dist.get_rank() * logits.shape[-1]
        largest = funcol.all_reduce(logits.amax(-1), "max", group)
        shifted = logits - largest.unsqueeze(-1)
        foreign = (labels < first) | (labels >= first + logits.shape[-1])
        own = (labels - first).masked_fill(foreign, 0)
        picked = shifted.gather(-1, own.unsqueeze(-1)).squeeze(-1).masked_fill(foreign, 0.0)
        picked = funcol.all_reduce(picked, "sum", group)
        exponentials = shifted.exp()
        total = funcol.all_reduce(exponentials.sum(-1), "sum", group)
        ctx.save_for_backward(exponentials / total.unsqueeze(-1), foreign, own)
        return total.log() - picked

    @staticmethod
    def backward(ctx, grad):
        shares, foreign, own = ctx.saved_tensors
        here = F.one_hot(own, shares.shape[-1]).to(shares.dtype) * (~foreign).unsqueeze(-1)
        return (shares - here) * grad.unsqueeze(-1), None, None


class ToAllShards(torch.autograd.Function):
    """The identity, whose gradient the ranks add up."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return funcol.all_reduce(grad, "sum", ctx.group), None


class ByHand(nn.Module):
    """The head, without DTensors."""

    def __init__(self, whole: Head) -> None:
        super().__init__()
        self.norm, self.head = whole.norm, nn.Linear(HIDDEN, CLASSES // dist.get_world_size(), bias=False)
        self.head.weight = nn.Parameter(whole.head.weight.detach().chunk(dist.get_world_size())[dist.get_rank()])

    def forward(self, x, labels):
        group = dist.group.WORLD.group_name
        logits = self.head(ToAllShards.apply(self.norm(x), group)).flatten(0, 1)
        return CrossEntropyOfShards.apply(logits, labels.flatten(), group).mean()


@dataclass(frozen=True)
class Program:
    """A head on several ranks.

    Attributes:
        loss: of logits and labels.
        gathered: whether each rank gets the logits of all; otherwise the loss is computed on DTensors.
        by_hand: whether it is written without DTensors.
        ignored: the label that some tokens have, None where none is ignored.
    """

    loss: Loss
    gathered: bool = False
    by_hand: bool = False
    ignored: int | None = -100

    def around(self) -> AbstractContextManager[None]:
        return nullcontext() if self.gathered or self.by_hand else loss_parallel()

    def spread(self, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if self.by_hand:
            return ByHand(model)
        style = (
            ColwiseParallel(output_layouts=Replicate()) if self.gathered else ColwiseParallel(use_local_output=False)
        )
        return parallelize_module(model, mesh, {"head": style})


PROGRAMS = {
    "loss parallel": Program(F.cross_entropy),
    "loss parallel, a sum": Program(summed, ignored=3),
    "loss parallel, weights of classes": Program(weighted, ignored=None),
    "by hand": Program(F.cross_entropy, by_hand=True, ignored=None),
    "gathered": Program(F.cross_entropy, gathered=True),
    "gathered, smoothed": Program(smoothed, gathered=True),
    "gathered, z-loss": Program(with_z_loss, gathered=True),
    "gathered, log-probabilities": Program(log_probabilities, gathered=True),
}


class Counting:
    """Compiles, and counts what compiled graphs do when they run: collectives by kind, and the largest value saved."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.saved = 0

    def _forward(self, gm: torch.fx.GraphModule, _: Any) -> Any:
        outputs: Any = gm.graph.output_node().args[0]
        self.saved = max([x.meta["val"].numel() for x in outputs[1:] if hasattr(x.meta.get("val"), "numel")], default=0)
        return self._run(gm, _)

    def _run(self, gm: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args):
            with _Collectives(self.found):
                return gm.forward(*args)

        return make_boxed_func(run)

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        """Compile a graph."""
        return aot_autograd(fw_compiler=self._forward, bw_compiler=self._run)(gm, inputs)


class _Collectives(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.counted = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional" and "wait" not in func.name():
            self.counted[f"{func._opname}" + (f" {args[1]}" if isinstance(args[1], str) else "")] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        errors: of the loss and of each gradient, relative to one process; "x" is that of the tokens.
        collectives: that ran, by kind.
        saved: elements of the largest value that the forward saves.
        verified: whether each region was verified.
        backward: pattern of each region, and how it makes its gradients.
        refusals: reasons and texts.
    """

    errors: dict[str, float]
    collectives: Counter[str]
    saved: int
    verified: list[bool | None]
    backward: list[tuple[str, str]]
    refusals: list[tuple[str, str]]


def outcome(name: str, mesh: DeviceMesh, **options: Any) -> Outcome:
    """Run a program on the ranks of a mesh."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    program = PROGRAMS[name]
    model = Head(program.loss).double()
    x = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (2, TOKENS))
    if program.ignored is not None:
        labels[0, :5] = program.ignored
    truth = _step(model, model, x, labels)
    count, own = Counting(), program.spread(copy.deepcopy(model), mesh)
    told = len(mst_fx.reports())
    compiled = torch.compile(own, backend="mst_fx", options={**OPTIONS, "inner": count, **options})
    with program.around():
        found = _step(own, compiled, x, labels)
    reports = mst_fx.reports()[told:]
    return Outcome(
        {key: float((found[key] - value).norm() / value.norm()) for key, value in truth.items()},
        count.found,
        count.saved,
        [region.verified for report in reports for region in report.regions],
        [(region.pattern, region.backward) for report in reports for region in report.regions],
        [(each.reason, each.text) for report in reports for each in report.refusals],
    )


def outcomes(names: list[str], inner: str = "") -> dict[str, Outcome]:
    """Run programs on all ranks; another compiler than `Counting` counts no collectives."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with frugal():
        return {name: outcome(name, mesh, **({"inner": inner} if inner else {})) for name in names}


def on_unlike_devices() -> list[int]:
    """Run a head within a share of a memory that is large on one rank, and small on the other.

    Returns the number of chunks on each rank.
    """
    device = Device("cpu", 2**40 >> (25 * dist.get_rank()), 1e7 * 10 ** dist.get_rank(), 2e7)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = PROGRAMS["loss parallel"].spread(Head(F.cross_entropy, 1024), mesh)
    x, labels = torch.randn(1, 8192, HIDDEN), torch.randint(0, 1024, (1, 8192))
    told = len(mst_fx.reports())
    options = {"memory_budget": 0.5, "min_bytes": 0, "inner": "aot_eager"}
    with mock.patch.object(surveyed, "device_of", return_value=device), loss_parallel():
        torch.compile(model, backend="mst_fx", options=options)(x, labels).backward()
    (report,) = mst_fx.reports()[told:]
    chunks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(chunks, [region.chunks for region in report.regions])
    return [count for counts in chunks for count in counts]


def all_of_it(names: list[str]) -> tuple[dict[str, Outcome], list[int]]:
    """Both, in one group of processes."""
    return outcomes(names), on_unlike_devices()


def _step(model: nn.Module, run: Callable[..., Any], x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss, and all gradients, as one process has them."""
    x = x.clone().requires_grad_()
    loss = run(x, labels)
    loss.backward()
    found = {"loss": loss.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    if isinstance(model, ByHand):
        found["head.weight"] = DTensor.from_local(
            found["head.weight"], init_device_mesh("cpu", (dist.get_world_size(),)), placements=[Shard(0)]
        )
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}
