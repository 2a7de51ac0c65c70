"""Tensor parallel programs, and what becomes of them: beside one process, and beside plain `torch.compile`."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from frugal import frugal
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import mst_fx

HIDDEN, TOKENS = 16, 24
OPTIONS = {"min_bytes": 0, "num_chunks": 4, "head_groups": 2, "strict": True, "verify": True}


class Gated(nn.Module):
    """A gated MLP; the last projection has a bias."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, features), nn.Linear(HIDDEN, features, bias=False)
        self.down = nn.Linear(features, HIDDEN)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """An MLP with one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 64), nn.Linear(64, HIDDEN)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A norm and an MLP beside a residual."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(HIDDEN), mlp

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Twice(nn.Module):
    """The tokens go through an MLP, and are read once more by an op that needs the other kind of gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Gated()

    def forward(self, x):
        y = x * 2
        return self.mlp(y) + y * y


class Adapted(Gated):
    """A gated MLP with an adapter of low rank, whose first matrix is plain and whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(HIDDEN, 2, bias=False), nn.Linear(2, 64, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x) + self.b(self.a(x))) * self.up(x))


class Attention(nn.Module):
    """Eight heads of queries share four of keys; a bias of keys would have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(HIDDEN, 32), nn.Linear(32, HIDDEN)
        self.k, self.v = nn.Linear(HIDDEN, 16, bias=False), nn.Linear(HIDDEN, 16)

    def forward(self, x):
        q, k, v = (made(x).unflatten(-1, (-1, 4)).transpose(1, 2) for made in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Checkpointed(Block):
    """A block that backward recomputes."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


MLP = {"gate": ColwiseParallel, "up": ColwiseParallel, "down": RowwiseParallel}


def styles(prefix: str = "", down: Mapping[str, Any] = {}, **options: Any) -> dict[str, Any]:
    """A plan for the projections of an MLP."""
    return {prefix + name: kind(**options, **(down if name == "down" else {})) for name, kind in MLP.items()}


@dataclass(frozen=True)
class Program:
    """A tensor parallel program.

    Attributes:
        make: the model, for one process.
        plan: the styles of its modules; None has all parameters whole on all ranks, as DTensors.
        tokens: the dim along which the ranks share the tokens, None where all have all of them.
        sharded: whether the tokens come, and the results go, as DTensors.
    """

    make: Callable[[], nn.Module]
    plan: Callable[[], dict[str, Any]] | None
    tokens: int | None = None
    sharded: bool = False


def _along_the_sequence() -> dict[str, Any]:
    whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    return {"norm": SequenceParallel(), "mlp": whole, **styles("mlp.", {"output_layouts": Shard(1)})}


def _along_the_sequence_local() -> dict[str, Any]:
    whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True)
    norm = SequenceParallel(use_local_output=True)
    return {"norm": norm, "mlp": whole, **styles("mlp.", {"output_layouts": Shard(1)})}


def _attention(**options: Any) -> dict[str, Any]:
    return {**{name: ColwiseParallel(**options) for name in "qkv"}, "o": RowwiseParallel(**options)}


@cache
def attend_on_shards() -> None:
    """On a CPU, torch has no rule for attention on DTensors: each rank attends with its heads."""
    heads = Shard(1)

    @register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    def _forward(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        return [([heads] * 2, [heads] * 3)]

    @register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
    def _backward(grad, q, k, v, out, sums, dropout_p, is_causal, *, attn_mask=None, scale=None):
        return [([heads] * 3, [*[heads] * 6, None, None])]


PROGRAMS = {
    "gated": Program(Gated, styles),
    "plain": Program(Plain, lambda: {"up": ColwiseParallel(), "down": RowwiseParallel()}),
    "narrow": Program(partial(Gated, 24), styles),  # 12 of 24 features on a rank, of tokens of 16
    "dtensors": Program(Gated, partial(styles, use_local_output=False), sharded=True),
    "twice": Program(Twice, partial(styles, "mlp.", use_local_output=False), sharded=True),
    "adapted": Program(Adapted, lambda: {**styles(), "b": ColwiseParallel()}),
    "checkpointed": Program(lambda: Checkpointed(Gated()), partial(styles, "mlp.")),
    "whole": Program(Gated, None, sharded=True),
    "batch": Program(Gated, None, tokens=0, sharded=True),
    "sequence": Program(lambda: Block(Gated()), _along_the_sequence, tokens=1),
    "sequence, local": Program(lambda: Block(Gated()), _along_the_sequence_local, tokens=1),
    "attention": Program(Attention, _attention),
    "attention, dtensors": Program(Attention, partial(_attention, use_local_output=False), sharded=True),
}


def parallel(model: nn.Module, mesh: DeviceMesh, program: Program) -> nn.Module:
    """Spread the parameters of a model."""
    if program.plan is None:
        return distribute_module(model, mesh)
    return parallelize_module(model, mesh, program.plan())


class Counting:
    """Counts the collectives in compiled graphs, by kind."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def _count(self, gm: torch.fx.GraphModule, _: Any) -> Any:
        for module in gm.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                if "c10d_functional" in str(node.target) and "wait" not in str(node.target):
                    self.found[str(node.target)] += 1
        return make_boxed_func(gm.forward)

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        """Compile a graph."""
        return aot_autograd(fw_compiler=self._count, bw_compiler=self._count)(gm, inputs)


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        errors: of the loss and of each gradient, relative to one process; "x" is that of the tokens.
        collectives: in the compiled graphs, by kind.
        without: those of plain `torch.compile`.
        regions: the patterns of the loops.
        refusals: reasons and texts.
        sizes: bytes of the temporaries of each region, without a loop.
    """

    errors: dict[str, float]
    collectives: Counter[str]
    without: Counter[str]
    regions: list[str]
    refusals: list[tuple[str, str]]
    sizes: list[int]


def outcome(name: str, mesh: DeviceMesh, **options: Any) -> Outcome:
    """Run a program on the ranks of a mesh."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    program = PROGRAMS[name]
    model = program.make().double()
    x = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    truth = _step(model, model, x)
    counts = [Counting(), Counting()]
    told = len(mst_fx.reports())
    for count, ours in zip(counts, (False, True), strict=True):
        own = parallel(copy.deepcopy(model), mesh, program)
        given = {**OPTIONS, "inner": count, **options}
        compiled = torch.compile(own, backend="mst_fx", options=given) if ours else torch.compile(own, backend=count)
        found = _step(own, compiled, x, program, mesh)
    reports = mst_fx.reports()[told:]
    return Outcome(
        {key: float((found[key] - value).norm() / value.norm()) for key, value in truth.items()},
        counts[1].found,
        counts[0].found,
        [region.pattern for report in reports for region in report.regions],
        [(each.reason, each.text) for report in reports for each in report.refusals],
        [region.bytes_before for report in reports for region in report.regions],
    )


def outcomes(names: list[str], inner: str = "") -> dict[str, Outcome]:
    """Run programs on all ranks; another compiler than `Counting` counts no collectives."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    attend_on_shards()
    with frugal():
        return {name: outcome(name, mesh, **({"inner": inner} if inner else {})) for name in names}


def _step(
    model: nn.Module, run: Callable[..., Any], x: torch.Tensor, program: Program | None = None, mesh: Any = None
) -> dict[str, torch.Tensor]:
    """The loss, and all gradients, as one process has them."""
    x = x.clone().requires_grad_()
    given: Any = x
    spread = program is not None and (program.tokens is not None or program.sharded)
    if program is not None and spread:
        where = Shard(program.tokens) if program.tokens is not None else Replicate()
        given = DTensor.from_local(x, mesh, [Replicate()]).redistribute(placements=[where])
        given = given if program.sharded else given.to_local()
    y = run(given)
    if program is not None and spread and not isinstance(y, DTensor):
        y = DTensor.from_local(y, mesh, [where])
    loss = (y.full_tensor() if isinstance(y, DTensor) else y).square().sum()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    found = {"loss": loss.detach(), "x": x.grad, **grads}
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}


def on_two_dims() -> tuple[dict[str, float], list[str]]:
    """Two blocks, tensor parallel on one dim of a 2 x 2 mesh and fully sharded on the other, each compiled by itself.

    Returns the errors of loss and gradients beside one process, and the patterns of the loops.
    """
    torch.manual_seed(0)
    model = nn.Sequential(Block(Gated()), Block(Plain())).double()
    x = torch.randn(4, TOKENS, HIDDEN, dtype=torch.float64)
    loss = model(x).square().mean()
    loss.backward()
    truth = {name: p.grad for name, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    own = copy.deepcopy(model)
    told = len(mst_fx.reports())
    plans = (styles("mlp."), {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()})
    for block, plan in zip(own, plans, strict=True):
        parallelize_module(block, mesh["tensor"], plan)
        block.compile(backend="mst_fx", options={**OPTIONS, "inner": "aot_eager"})
        fully_shard(block, mesh=mesh["data"])
    fully_shard(own, mesh=mesh["data"])
    own.zero_grad()
    own(x.chunk(2)[mesh["data"].get_local_rank()]).square().mean().backward()
    errors = {name: (p.grad.full_tensor() - truth[name]) / truth[name].norm() for name, p in own.named_parameters()}
    regions = [region.pattern for report in mst_fx.reports()[told:] for region in report.regions]
    return {name: float(error.norm()) for name, error in errors.items()}, regions


def planned_llama(folder: str) -> tuple[dict[str, float], list[mst_fx.Report]]:
    """A small Llama that transformers spreads by the plan that comes with it (`tp_plan="auto"`).

    Returns the errors of loss and gradients beside one process, and the reports.

    Args:
        folder: holds its weights.
    """
    from transformers import AutoModelForCausalLM

    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, TOKENS))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    truth = model(input_ids=ids, labels=ids).loss
    truth.backward()
    mesh = init_device_mesh("cpu", (world,))
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, tp_plan="auto", device_mesh=mesh)
    told = len(mst_fx.reports())
    compiled = torch.compile(
        own, backend="mst_fx", options={**OPTIONS, "inner": "aot_eager", "returned_logits": "drop"}
    )
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    errors = {"loss": float((loss - truth).abs())}
    for (name, p), whole in zip(own.named_parameters(), model.parameters(), strict=True):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        errors[name] = float((grad - whole.grad).norm() / whole.grad.norm())
    return errors, mst_fx.reports()[told:]
