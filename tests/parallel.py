"""A small language model on several ranks: its parts, its truth in one process, and what becomes of a program."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import mst_fx

D, HEADS, FF, V = 16, 4, 64, 96
TOKENS, GROUPS = 24, 2
OPTIONS = {"min_bytes": 0, "num_chunks": 3, "head_groups": GROUPS, "strict": True, "inner": "aot_eager"}
Tensors = dict[str, torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """Attention and a gated MLP, each beside a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate, self.up = nn.Linear(D, width, bias=False), nn.Linear(D, width, bias=False)
        self.down, self.norm = nn.Linear(width, D, bias=False), nn.RMSNorm(D)
        self.attention: Callable[..., torch.Tensor] = F.scaled_dot_product_attention
        self.checkpointed = False

    def forward(self, x):
        return checkpoint(self._forward, x, use_reentrant=False) if self.checkpointed else self._forward(x)

    def _forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Head(nn.Linear):
    """A head and its loss: the mean over the labels of all ranks, and beside it what to show of it on all ranks."""

    def forward(self, x, labels, count=None):
        world = dist.get_world_size()
        if count is None:
            count = funcol.all_reduce((labels >= 0).sum(), "sum", dist.group.WORLD)
        logits = super().forward(x).flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-1, reduction="sum") * world / count
        return loss, funcol.all_reduce(loss.detach(), "sum", dist.group.WORLD) / world


class Model(nn.Module):
    """Blocks and a head.

    Attributes:
        checkpointed: blocks run in checkpoints, which a compiled block does not see.
    """

    def __init__(self, width: int = FF, blocks: int = 1) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(V, D), Head(D, V, bias=False)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.checkpointed = False

    def forward(self, ids, labels, count=None):
        x = self.tokens(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x, labels, count)


def batches(lengths: Sequence[int], seed: int) -> list[Batch]:
    """Tokens and labels of several sequences, which differ in how many labels they have."""
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for number, length in enumerate(lengths):
        ids, labels = torch.randint(0, V, (2, 2, length), generator=drawn)
        labels[:, : 3 + 4 * number] = -1
        found.append((ids, labels))
    return found


def truth_of(model: nn.Module, given: Sequence[Batch]) -> Tensors:
    """Loss and gradients of one process that has the batches of all ranks, in float64."""
    model = copy.deepcopy(model).double()
    for block in model.blocks:
        block.attention = F.scaled_dot_product_attention
    count = torch.stack([(labels >= 0).sum() for _, labels in given]).sum()
    loss = torch.stack([model(*batch, count=count)[0] for batch in given]).sum() / dist.get_world_size()
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def gradients_of(model: nn.Module) -> Tensors:
    """Whole gradients, by the names that the parameters have without wrappers."""
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        if grad is not None:
            found[name.replace("_orig_mod.", "").removeprefix("module.")] = grad.double()
    return found


def errors_of(found: Tensors, truth: Tensors) -> dict[str, float]:
    """Errors relative to one process."""
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in truth.items()}


@dataclass(frozen=True)
class Way:
    """A way to compile.

    Attributes:
        ours: with mst_fx, and with plain `torch.compile` otherwise.
    """

    ours: bool

    def given(self, **options: Any) -> dict[str, Any]:
        """Arguments of `torch.compile`."""
        return {"backend": "mst_fx", "options": {**OPTIONS, **options}} if self.ours else {"backend": "aot_eager"}


class Counting:
    """Counts the collectives that run within it, by kind."""

    def __enter__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.profile.__exit__(*error)
        names = (event.name for event in self.profile.events())
        self.found = Counter(name for name in names if name.startswith("gloo:"))


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        errors: of the loss and of each gradient, relative to one process.
        without: those of plain `torch.compile`.
        collectives: of the last step, by kind.
        before: those of plain `torch.compile`.
        regions: the patterns of the loops.
        refusals: reasons and texts.
        offloaded: bytes of each value that is on the host between forward and backward.
    """

    errors: dict[str, float]
    without: dict[str, float]
    collectives: Counter[str]
    before: Counter[str]
    regions: list[str]
    refusals: list[tuple[str, str]]
    offloaded: list[int]


def outcome(program: Callable[[Way], tuple[dict[str, float], Counter[str]]]) -> Outcome:
    """Run a program with plain `torch.compile`, and with mst_fx."""
    results = []
    told = len(mst_fx.reports())
    for way in (Way(ours=False), Way(ours=True)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        results.append(program(way))
    (without, before), (errors, collectives) = results
    reports = mst_fx.reports()[told:]
    return Outcome(
        errors,
        without,
        collectives,
        before,
        [region.pattern for report in reports for region in report.regions],
        [(each.reason, each.text) for report in reports for each in report.refusals],
        [value.bytes for report in reports for value in report.offloaded],
    )
