"""Nodes of the captured torch-level graph -> an aten graph of the same computation.

The lowering decomposes composite ops (see `decompositions`), turns autocast's casts into nodes and no_grad blocks into
detach nodes, and makes writes to values of the region itself out-of-place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node, map_arg
from torch.fx.traceback import preserve_node_meta
from torch.fx.traceback import set_current_meta as set_current_meta
from torch.utils._pytree import tree_map_only

from mst_fx.capture.attention_on_meta import AttentionOfGpu
from mst_fx.capture.decompositions import decompositions
from mst_fx.capture.opened import openings
from mst_fx.capture.pairs import on_pairs
from mst_fx.capture.run_node import brings_gradients, execute, execute_unrecorded, execute_with_own_gradients
from mst_fx.core.aten_ops import is_mutable, is_random
from mst_fx.core.clean_room import without_autocast
from mst_fx.core.graph_modules import layout_free
from mst_fx.core.modes import Mode
from mst_fx.core.sizes import any_length, number, unguarded
from mst_fx.core.torch_private.captured import FakeTensor
from mst_fx.core.torch_private.collectives import is_collective
from mst_fx.core.torch_private.symbols import ShapeEnv
from mst_fx.core.torch_private.tracing import (
    FakeTensorMode,
    disable_fake_tensor_cache,
    enable_python_dispatcher,
    make_fx,
)
from mst_fx.core.values import fake_value, has_gradient
from mst_fx.ops.overwritten import WithoutWrites
from mst_fx.ops.own_gradients import only_for_gradients

T = TypeVar("T")
aten = torch.ops.aten


def lower(
    owner: GraphModule,
    nodes: Sequence[Node],
    live_ins: Sequence[Node],
    outputs: Sequence[Node],
    modes: Mapping[Node, Mode],
    *,
    examples: Sequence[Any] | None = None,
    gathers: bool = True,
) -> GraphModule:
    """Trace `nodes` of `owner` (in graph order) into aten.

    Args:
        owner: the module that holds the nodes' graph.
        nodes: the nodes to trace.
        live_ins: the values that the nodes read from outside; they become placeholders, in this order.
        outputs: the values to return, in this order.
        modes: the mode of each node.
        examples: values to trace on, in place of the captured values of the live-ins; no two are the same tensor.
        gathers: as for `decompositions`.

    Returns:
        A graph module whose nodes hold their fake values in `meta["val"]`.
    """
    recorded = any(modes[node].grad for node in nodes)

    def run(*values: Any) -> list[Any]:
        env = dict(zip(live_ins, values, strict=True))
        for node in nodes:
            line, autocast, grad = set_current_meta(node), under(modes[node].autocast), _gradients_at(node, env)
            with line, autocast, grad:  # each aten op records the user's line
                env[node] = _runner(node, modes[node], recorded)(owner, node, env)
        return [env[node] for node in outputs]

    examples = apart([fake_value(node) for node in live_ins]) if examples is None else list(examples)
    with tracing(examples):
        lowered = traced(run, examples, decompositions(gathers))
        if any(mutates(node) for node in lowered.graph.nodes):
            out_of_place = torch.func.functionalize(WithoutWrites(lowered).run, remove="mutations")
            with without_autocast():  # the first trace has made its casts nodes
                lowered = traced(out_of_place, examples, decompositions(gathers))
        real = on_pairs(lowered)
        if real is not None:
            with without_autocast():
                lowered = traced(real, examples, decompositions(gathers))
        _settle(lowered)
    _merge_backward(lowered.graph)
    _drop_unread(lowered)
    return lowered


def _gradients_at(node: Node, env: Mapping[Node, Any]) -> AbstractContextManager[Any]:
    """Return the grad mode of attention: some kernels give no gradient for a mask, so torch has to know of it.

    A value that was made in the trace, which has no gradients, does not need one; nor does a cast that autocast makes.
    """
    if node.target is not torch.nn.functional.scaled_dot_product_attention:
        return nullcontext()
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    if not isinstance(mask, Node) or not has_gradient(mask):
        return nullcontext()
    env[mask].requires_grad_()
    return torch.enable_grad()


def _merge_backward(graph: Graph) -> None:
    """Let the backward of a function read what its forward has computed alike: a weight is unpacked once."""
    backward, known = set(only_for_gradients(graph)), dict[Hashable, Node]()
    for node in graph.nodes:
        key = (node.target, str(node.args), str(node.kwargs))
        if node.op == "call_function" and not is_random(node.target):
            same = known.setdefault(key, node)
            if same is not node and node in backward:
                node.replace_all_uses_with(same)


def _runner(node: Node, mode: Mode, recorded: bool) -> Callable[..., Any]:
    """Return what runs a node of a region; `recorded` says whether gradients are recorded anywhere in it."""
    if not mode.grad:
        return execute_unrecorded if recorded else execute
    return execute_with_own_gradients if brings_gradients(node) else execute


def _drop_unread(lowered: GraphModule) -> None:
    """Erase what no result needs, and checks of values (of `one_hot`): a check reads all tokens and gives nothing."""
    for node in reversed(lowered.graph.nodes):
        if node.op == "call_function" and not node.users and not is_mutable(node.target):
            lowered.graph.erase_node(node)


def traced(
    function: Callable[..., Any], examples: Sequence[Any], table: Mapping[Any, Callable[..., Any]] | None = None
) -> GraphModule:
    """Trace a function into an aten graph.

    Args:
        function: it is called once.
        examples: fake values to call it with; the graph has a placeholder for each of their leaves.
        table: decompositions, by op.
    """
    module = make_fx(function, decomposition_table=table)(*examples)
    more = openings(module.graph)
    if not more:
        return module
    module.graph.eliminate_dead_code()  # an alias of a constant that nobody reads: torch 2.11 does not run it again
    with without_autocast():  # the first trace has made its casts nodes
        return make_fx(Interpreter(module).run, decomposition_table={**(table or {}), **more})(*examples)


def retraced(function: Callable[..., Any], examples: Sequence[Any]) -> GraphModule:
    """Trace a function that runs the nodes of an aten graph in another way, without what no result needs.

    Args:
        function: of the values of the graph's placeholders.
        examples: fake values for these.
    """
    with tracing(examples), without_autocast():
        module = traced(function, examples)
    module.graph.eliminate_dead_code()
    return module


def executed(lowered: GraphModule, values: Iterable[Any], runs: Callable[[Node], bool]) -> dict[Any, Any]:
    """Return the values of an aten graph's placeholders, and of the nodes to run, each under its own meta.

    Args:
        lowered: the module that holds the graph.
        values: of its placeholders.
        runs: says which nodes to run; they read one another and placeholders alone.
    """
    env: dict[Any, Any] = {}
    given = iter(values)
    for node in lowered.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op != "output" and runs(node):
            with set_current_meta(node):
                env[node] = execute(lowered, node, env)
    return env


def apart(values: Sequence[Any]) -> list[Any]:
    """Return the fake values with an alias for each tensor that is there twice: a trace takes it for one value.

    A vector and its `flatten`, or a tensor and its `contiguous`, may be one tensor here, and two in another region that
    is alike and shares the graph.
    """
    seen: set[int] = set()

    def own(value: torch.Tensor) -> torch.Tensor:
        if id(value) in seen:
            return value.detach().requires_grad_(value.requires_grad)
        seen.add(id(value))
        return value

    return [tree_map_only(torch.Tensor, own, value) for value in values]


@contextmanager
def tracing(examples: Sequence[Any]) -> Iterator[None]:
    """Trace inside the fake mode of the captured values, without gradients: the body makes those."""
    modes = {value.fake_mode for value in examples if hasattr(value, "fake_mode")}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(preserve_node_meta())
        mode = modes.pop() if len(modes) == 1 else None
        if mode is not None:
            stack.enter_context(mode)
        if any(isinstance(value, torch.Tensor) and value.device.type == "meta" for value in examples):
            stack.enter_context(AttentionOfGpu())
        if any(isinstance(size, torch.SymInt) for size in _sizes(examples)):  # also one that has turned out to be fixed
            stack.enter_context(_with_symbols(mode))
            stack.enter_context(unguarded())
        yield


@contextmanager
def _with_symbols(mode: FakeTensorMode | None) -> Iterator[None]:
    """Trace on sizes that are only known at run time.

    Composite ops would ask for their sizes as numbers, but for the dispatcher in Python. torch's cache of what ops give
    takes longer with symbols than the ops, nearly all of which the trace meets once.
    """
    with enable_python_dispatcher(), disable_fake_tensor_cache(mode) if mode is not None else nullcontext():
        yield


@contextmanager
def under(autocast: Sequence[Sequence[Any]]) -> Iterator[None]:
    """Enter these autocast blocks, outermost first; each use of a weight gets a cast of its own."""
    with ExitStack() as stack:
        for device_type, dtype, enabled, _ in autocast:
            stack.enter_context(torch.autocast(device_type, dtype, enabled, cache_enabled=False))
        yield


def mutates(node: Node) -> bool:
    """Return whether an aten node writes to an operand."""
    return is_mutable(node.target)


def _sizes(values: Sequence[Any]) -> Iterator[Any]:
    """Yield sizes and strides: where rows are a view of a longer value, a stride may hold that value's length."""
    for value in values:
        strided = isinstance(value, torch.Tensor) and value.layout == torch.strided
        yield from (*value.shape, *value.stride()) if strided else (value,)


MakeInputs: TypeAlias = Callable[[int], Sequence[torch.Tensor]]


def trace(
    function: Callable[..., Any], make_inputs: MakeInputs, length: int | None, like: Sequence[torch.Tensor] = ()
) -> GraphModule:
    """Trace a function into aten on fake tensors of its own, whatever autocast or grad mode is on.

    The module that it returns is not recompiled.

    Args:
        function: a function of tensors; it may differentiate.
        make_inputs: makes its inputs from the length, under the fake mode.
        length: positions of the chunk; None traces for every length.
        like: as for `on_fakes`.
    """
    traced = on_fakes(make_fx(function), make_inputs, length, like)
    _drop_unread_collectives(traced.graph)
    for node in traced.graph.nodes:
        node.target = layout_free(node.target)
    return traced


def _drop_unread_collectives(graph: Graph) -> None:
    """Erase collectives that no output needs, and what only they read: torch keeps them, and all ranks drop them."""
    if any(is_collective(node.target) for node in graph.nodes):
        graph.eliminate_dead_code(lambda node: node.is_impure() and not is_collective(node.target))


def on_fakes(
    function: Callable[..., T], make_inputs: MakeInputs, length: int | None, like: Sequence[torch.Tensor] = ()
) -> T:
    """Run a function on fake tensors, whatever autocast or grad mode is on; arguments as for `trace`.

    Args:
        function: as for `trace`.
        make_inputs: as for `trace`.
        length: as for `trace`.
        like: fake values with all sizes that the inputs have. If one is only known at run time, and it is no length of
            the chunk, the inputs are fakes of the same mode, in which that size has a meaning.
    """
    varying = length is not None and any(isinstance(size, torch.SymInt) for size in _sizes(like))
    modes = {value.fake_mode for value in like if varying and isinstance(value, FakeTensor)}
    shape_env = ShapeEnv()
    mode = modes.pop() if len(modes) == 1 else FakeTensorMode(shape_env=shape_env)
    with ExitStack() as stack:
        for context in (mode, torch.enable_grad(), without_autocast()):
            stack.enter_context(context)
        if length is None or varying:
            stack.enter_context(_with_symbols(mode))
        if varying:
            stack.enter_context(unguarded())
        return function(*make_inputs(any_length(shape_env) if length is None else length))


def _settle(lowered: GraphModule) -> None:
    """Put numbers in place of sizes that are known by now."""
    for node in lowered.graph.nodes:
        node.args, node.kwargs = map_arg(
            (node.args, node.kwargs), lambda operand: _settled(operand, operand.meta["val"])
        )
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
            shape, stride = ([_settled(size, size) for size in sizes] for sizes in (value.shape, value.stride()))
            node.meta["val"] = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)


def _settled(instead: Any, size: Any) -> Any:
    known = number(size) if isinstance(size, torch.SymInt) else None
    return instead if known is None else known
