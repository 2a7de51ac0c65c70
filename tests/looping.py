"""Loops a function at the level of aten graphs and puts the results together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from mst_fx.bodies.body import Body, Gradients, forward_body, gradient_body
from mst_fx.bodies.chunk import axis_of
from mst_fx.bodies.connected import connected
from mst_fx.capture.decompositions import decompositions
from mst_fx.capture.run_node import execute
from mst_fx.core.aten_ops import FILLS
from mst_fx.placement.partition import Stages, partition
from mst_fx.placement.placement import PARTIAL, WHOLE, Split
from mst_fx.placement.propagate import propagate
from mst_fx.placement.rules import NodePlacement
from mst_fx.runtime.cache_version import VERSION
from mst_fx.runtime.loop_operator import LoopSpec, run_loop
from mst_fx.runtime.mini_sequence import CallSpec, mini_sequence
from mst_fx.verify.by_chunks import accepted

CLOSE = {"rtol": 1e-9, "atol": 1e-11, "equal_nan": True}


class Call(NamedTuple):
    """A function and what it is called with."""

    function: Callable[..., Any]
    inputs: Sequence[torch.Tensor]


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Reproducible normal values; ties are practically impossible."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def learnt(*shape: int, seed: int = 0) -> torch.Tensor:
    """The same, with a gradient."""
    return values(*shape, seed=seed).requires_grad_()


def indices(*shape: int, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def aten_graph(
    call: Call, table: Mapping[Any, Callable[..., Any]] | None = None, functional: bool = False
) -> GraphModule:
    """The aten graph of a function, with these decompositions, with writes made out of place if so wanted."""
    function = torch.func.functionalize(call.function, remove="mutations") if functional else call.function
    with torch.no_grad():  # as the library lowers: autograd would leave detach nodes behind
        return make_fx(lambda *inputs: function(*inputs), decomposition_table=table)(*call.inputs)


def placeholders(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def returned(module: GraphModule) -> list[Node]:
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    return as_list(output.args[0])


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def placed(call: Call, split: Split, position: int = 0) -> list[NodePlacement | str]:
    """Where the results lie when one operand is split; "epilogue" for what runs after the loop."""
    module = aten_graph(call)
    placements = propagate(module.graph, {placeholders(module)[position]: split})
    return ["epilogue" if node in placements.epilogue else placements.of[node] for node in returned(module)]


def operands_placed(call: Call, split: Split, position: int = 0) -> list[NodePlacement]:
    """Where the operands lie when one of them is split: the others follow."""
    module = aten_graph(call)
    operands = placeholders(module)
    placements = propagate(module.graph, {operands[position]: split})
    return [placements.of[operand] for operand in operands]


def accepted_axes(module: GraphModule, seed: Node, split: Split) -> Iterator[Stages]:
    """Stages for the split, or for the parts of it that a view asks for; nothing where it is refused."""
    for _, stages in accepted(seed, split, partial(loop_everything, module, seed)):
        yield stages


def loop_everything(module: GraphModule, seed: Node, split: Split) -> Stages:
    """Stages whose loop holds every value that is not whole, so that each placement is put to the test."""
    placements = propagate(module.graph, {seed: split})
    computed = [n for n in module.graph.nodes if n.op == "call_function" and n not in placements.epilogue]
    early = {node for node in computed if _is_whole(placements.of[node]) or node in placements.made}
    loop = [node for node in computed if node not in early]
    prologue = early | set().union(*(ancestors(node) for node in early))
    assert seed not in prologue, "what runs before the loop depends on what is split"
    prologue = [node for node in module.graph.nodes if node in prologue and node.op == "call_function"]
    outside = [o for node in loop for o in node.all_input_nodes if o not in loop]
    left = [*returned(module), *(o for node in placements.epilogue for o in node.all_input_nodes)]
    return Stages(
        graph=module.graph,
        placements=placements,
        stream=seed,
        axis=split,
        length=split.axis_length(seed.meta["val"].shape),
        prologue=tuple(prologue),
        loop=tuple(loop),
        epilogue=placements.epilogue,
        operands=tuple(dict.fromkeys(outside)),
        results=tuple(dict.fromkeys(node for node in left if node in loop)),
        outputs=tuple(returned(module)),
    )


def _is_whole(result: NodePlacement) -> bool:
    return all(part == WHOLE for part in as_list(result))


def ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in found and node.target not in FILLS:  # a fill takes a dtype from its operand, and no rows
            pending.extend(node.all_input_nodes)
        found.add(node)
    return found


def looped(module: GraphModule, stages: Stages, inputs: Sequence[torch.Tensor], chunk: int) -> list[torch.Tensor]:
    """What the graph returns when it runs as prologue, loop over chunks of this length, and epilogue."""
    env: dict[Node, Any] = dict(zip(placeholders(module), inputs, strict=True))
    for node in stages.prologue:
        env[node] = execute(module, node, env)
    if stages.results:
        operands = [env[node] for node in stages.operands]
        env.update(zip(stages.results, run_forward(stages, operands, chunk), strict=True))
    for node in stages.epilogue:
        env[node] = execute(module, node, env)
    return [env[node] for node in stages.outputs]


def run_forward(stages: Stages, operands: list[torch.Tensor], chunk: int) -> list[torch.Tensor]:
    bodies, outs = full_and_tail(stages, chunk, partial(forward_body, stages))
    return run_loop(tuple(map(_on_a_list, bodies)), LoopSpec(VERSION, chunk, ins_of(stages), outs), operands)


def _on_a_list(module: GraphModule | None) -> Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]:
    return lambda operands: module(*operands)


def ins_of(stages: Stages) -> tuple[Any, ...]:
    return tuple(axis_of(stages, node) for node in stages.operands)


def full_and_tail(
    stages: Stages, chunk: int, make: Callable[[int | None], Body], any_length: bool = False
) -> tuple[tuple[GraphModule, GraphModule | None], tuple[Any, ...]]:
    """The bodies of a full chunk and of the ragged one, and how their outputs become results.

    With `any_length` the ragged one is made for every length, as if the length were only known at run time.
    """
    ragged = stages.length % chunk
    full, tail = make(chunk), make(None if any_length else ragged) if ragged else None
    assert tail is None or tail.outs == full.outs
    return (full.module, tail and tail.module), full.literals


def differentiably_looped(
    module: GraphModule, stages: Stages, inputs: Sequence[torch.Tensor], chunk: int, in_forward: bool, any_length: bool
) -> list[torch.Tensor]:
    """As `looped`, with results that can be differentiated.

    Where the loop gives one scalar, `in_forward` makes its gradients in the forward; else they are recomputed.
    """
    env: dict[Node, Any] = dict(zip(placeholders(module), inputs, strict=True))
    for node in stages.prologue:
        env[node] = execute(module, node, env)
    operands = [env[node] for node in stages.operands]
    wanted = tuple(position for position, operand in enumerate(operands) if operand.requires_grad)
    wanted, differentiable = connected(stages, wanted, stages.results)
    sinks = [stages.results[position] for position in differentiable]
    in_forward = in_forward and len(sinks) == 1 and stages.placement(sinks[0]) == PARTIAL and is_scalar(sinks[0])
    gradients = Gradients(wanted, differentiable, in_forward, "float32")
    ins = ins_of(stages)
    upstream = () if in_forward else tuple(axis_of(stages, node) for node in sinks)
    forward, outs = full_and_tail(stages, chunk, partial(forward_body, stages), any_length)
    backward, grad_outs = full_and_tail(stages, chunk, partial(gradient_body, stages, gradients), any_length)
    spec = CallSpec(
        "in_forward" if in_forward else "recompute",
        tuple(LoopSpec(VERSION, chunk, ins, outs)),
        tuple(LoopSpec(VERSION, chunk, upstream + ins, grad_outs)),
        differentiable,
        wanted,
    )
    env.update(zip(stages.results, mini_sequence(*forward, *backward, tuple(spec), *operands), strict=True))
    for node in stages.epilogue:
        env[node] = execute(module, node, env)
    return [env[node] for node in stages.outputs]


def is_scalar(node: Node) -> bool:
    return node.meta["val"].numel() == 1


def check_loop(call: Call, chunk: int, in_forward: bool = False, any_length: bool = False) -> Stages:
    """The stages, once their loop has given what eager execution gives, values and gradients."""
    module = aten_graph(call, decompositions())
    stages = partition(module, placeholders(module)[0])
    chunk = min(chunk, stages.length)
    results = differentiably_looped(module, stages, call.inputs, chunk, in_forward, any_length)
    expected = as_list(call.function(*call.inputs))
    torch.testing.assert_close(results, expected, **CLOSE)
    ours, eager = (_gradients(outputs, call.inputs) for outputs in (results, expected))
    torch.testing.assert_close(ours, eager, **CLOSE)
    return stages


def _gradients(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Of all outputs at once; the upstream gradient is not 1."""
    leaves = [x for x in inputs if x.requires_grad]
    upstream = [torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y) for y in outputs]
    return torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)
