"""Runs of an excerpt: as captured, in float64 and in its own dtypes, and looped.

Random ops of the region draw from a generator of ours. A loop draws by design in another way than the program, so a
region with random ops runs as lowered, in place of as captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

from mst_fx.capture.lower import under
from mst_fx.capture.opened import OF_TORCH
from mst_fx.capture.run_node import execute
from mst_fx.core.aten_ops import DRAWS
from mst_fx.core.clean_room import clean_room, without_autocast
from mst_fx.core.torch_private.collectives import (
    EXCHANGES,
    GATHERS,
    REDUCE_ALL,
    REDUCE_PARTS,
    WAITS,
    is_collective,
    ranks_in,
)
from mst_fx.core.torch_private.tracing import TorchDispatchMode
from mst_fx.core.values import is_sharded
from mst_fx.ops.own_gradients import backward_of, only_for_gradients, own_gradients, own_of, with_own_gradients
from mst_fx.verify.excerpt import Excerpt

aten = torch.ops.aten
Program: TypeAlias = Callable[..., Sequence[torch.Tensor]]
SEED = 1


@dataclass(frozen=True)
class Outcome:
    """Results of a run, on the CPU, floats in float64.

    Attributes:
        outputs: outputs of the region.
        gradients: one for each live-in that needs one, in the order of the live-ins.
        likes: shape and dtype of each of these, before the conversion.
    """

    outputs: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]
    likes: tuple[tuple[torch.Size, torch.dtype], ...]

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        """Outputs, then gradients."""
        return (*self.outputs, *self.gradients)


def as_captured(excerpt: Excerpt) -> Program:
    """Return a program of the region's own nodes; of the lowered ones where they draw numbers."""
    stages, region = excerpt.work.stages, excerpt.region

    def run(*values: Any) -> Sequence[torch.Tensor]:
        env: dict[Node, Any] = dict(zip(region.live_ins, values, strict=True))
        recorded = torch.is_grad_enabled()
        for node in region.nodes:
            mode = region.modes[node]
            with under(mode.autocast), torch.set_grad_enabled(recorded and mode.grad):
                env[node] = execute(region.owner, node, env)
        return [env[node] for node in region.outputs]

    def run_lowered(*values: Any) -> Sequence[torch.Tensor]:
        placeholders = (node for node in stages.graph.nodes if node.op == "placeholder")
        env: dict[Node, Any] = dict(zip(placeholders, values, strict=True))
        generator = torch.Generator().manual_seed(SEED)
        steps = only_for_gradients(stages.graph)
        run_node = partial(execute, region.owner)
        with without_autocast():  # a lowered graph holds its casts as nodes
            for node in stages.graph.nodes:
                if node.target in DRAWS:
                    env[node] = _draw(node.args, node.kwargs, generator)
                elif node.target == own_gradients:
                    made, operands = (list(map(env.__getitem__, nodes)) for nodes in own_of(node)[:2])
                    backward = backward_of(node, steps, env, run_node)
                    env[node] = list(with_own_gradients(made, operands, backward))
                elif node.op == "call_function" and node not in steps:
                    env[node] = run_node(node, env)
        return [env[node] for node in stages.outputs]

    return run_lowered if any(node.target in DRAWS for node in stages.graph.nodes) else run


def as_looped(module: GraphModule) -> Program:
    """Return a program of a graph with loops."""

    def run(*values: Any) -> Sequence[torch.Tensor]:
        return _Interpreter(module, torch.Generator().manual_seed(SEED)).run(*values)

    return run


class _Interpreter(Interpreter):
    def __init__(self, module: GraphModule, generator: torch.Generator) -> None:
        super().__init__(module)
        self.generator = generator

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in DRAWS:
            return _draw(args, kwargs, self.generator)
        return super().call_function(target, args, kwargs)


def _draw(args: Any, kwargs: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
    low, high, size = args
    return torch.randint(low, high, size, generator=generator, dtype=kwargs.get("dtype")).to(kwargs.get("device"))


class InFloat64(TorchDispatchMode):
    """Runs every op in float64 and on the CPU, whatever dtype and device its program names.

    An op without a float64 form runs in float32, and so does an op of another library: where its kernel does not know
    float64, it may leave its result as it found the memory, without an error.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op."""
        if _on_dtensors(args, kwargs):
            return NotImplemented
        if func == aten.view.dtype:
            raise NotImplementedError("bits of a float are read as another dtype")
        args, kwargs = tree_map(_in_float64_on_cpu, (args, kwargs or {}))
        if func.namespace in OF_TORCH or func._schema.is_mutable:
            try:
                return func(*args, **kwargs)
            except RuntimeError:
                if func._schema.is_mutable:
                    raise
        args, kwargs = tree_map(_as_float32, (args, kwargs))
        return tree_map(_as_float64, func(*args, **kwargs))


class Alone(TorchDispatchMode):
    """Runs collectives as if all ranks held what this one holds: none waits for another, which may run no trial.

    What ranks exchange comes back in reverse order: no part is lost, and one that goes to another place shows.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op."""
        if _on_dtensors(args, kwargs):
            return NotImplemented
        if not is_collective(func):
            return func(*args, **(kwargs or {}))
        if func in WAITS or len(args) == 1:
            return args[0]
        x, ranks = args[0], ranks_in(args[-1])
        if func in GATHERS:
            return torch.cat([x] * ranks)
        if func in EXCHANGES and len({*args[1]}) == len({*args[2]}) == 1:
            return torch.cat(x.chunk(ranks)[::-1])
        if func not in (*REDUCE_ALL, *REDUCE_PARTS):
            raise NotImplementedError(f"{func} communicates")
        reduced = {"sum": x * ranks, "product": x**ranks}.get(args[1], x.clone())
        return reduced if func in REDUCE_ALL else reduced.chunk(ranks)[0].clone()


def _on_dtensors(args: Any, kwargs: Any) -> bool:
    """Return whether an op runs on DTensors: it runs others on their shards, and these are what a mode waits for."""
    return any(is_sharded(x) for x in tree_leaves((args, kwargs)))


def _in_float64_on_cpu(given: Any) -> Any:
    if isinstance(given, torch.dtype):
        return torch.float64 if given.is_floating_point else given
    return torch.device("cpu") if isinstance(given, torch.device) else given


def _as_float32(given: Any) -> Any:
    if isinstance(given, torch.dtype):
        return torch.float32 if given == torch.float64 else given
    return given.float() if isinstance(given, torch.Tensor) and given.dtype == torch.float64 else given


def _as_float64(given: Any) -> Any:
    return given.double() if isinstance(given, torch.Tensor) and given.dtype == torch.float32 else given


def outcomes(
    program: Program, given: Sequence[Any], upstream: Sequence[torch.Tensor | None], layouts: int = 1
) -> list[Outcome]:
    """Run a program, and its backward once for each layout of the upstream gradients: contiguous, then transposed.

    Args:
        program: the program.
        given: values of the live-ins.
        upstream: the gradient of each output, None where it gets none.
        layouts: number of layouts, 1 or 2.
    """
    leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    with torch.set_grad_enabled(bool(leaves)):
        outputs = program(*given)
    pairs = [(out, up) for out, up in zip(outputs, upstream, strict=True) if up is not None and out.requires_grad]
    made = []
    for layout in range(layouts if pairs and leaves else 1):
        grads: Sequence[torch.Tensor | None] = [None for _ in leaves]
        if pairs and leaves:
            seeds = [_upstream(up.to(out), transposed=layout == 1) for out, up in pairs]
            ends = [out for out, _ in pairs]
            grads = torch.autograd.grad(ends, leaves, seeds, retain_graph=layout + 1 < layouts, allow_unused=True)
        known = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]
        likes = tuple((x.shape, x.dtype) for x in (*outputs, *known))
        made.append(Outcome(tuple(map(_recorded, outputs)), tuple(map(_recorded, known)), likes))
    return made


def _upstream(grad: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """Return the same values; `transposed` reverses the order of the dims in memory."""
    dims = list(reversed(range(grad.dim())))
    return grad.permute(dims).contiguous().permute(dims) if transposed else grad


def _recorded(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().cpu()
    return x.double() if x.is_floating_point() else x


@contextmanager
def isolated() -> Iterator[None]:
    """Hide the runs from modes and hooks around the compile, and from other ranks.

    Autocast stays on, as the program runs under it.
    """
    with clean_room(), torch.enable_grad(), Alone():
        yield
