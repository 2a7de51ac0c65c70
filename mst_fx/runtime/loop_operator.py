"""The loop operator: the host runs a body over one chunk after the other, and adds up in place.

`mini_sequence_loop(full, tail, spec, *operands)` stays one node of the graph until Inductor, so no compiler can reorder
or fuse the chunks until all of them are alive.

Terms
  body       an aten graph module that computes one chunk (one mini-sequence)
  full, tail the bodies for a full chunk and for the ragged last one (None where the length divides)
  spec       (version, chunk length in positions, ins, outs, strides): plain literals, so that graphs, cache keys and
             generated code can hold it
  ins        for each operand None (whole) or (dim, outer, inner), as in `placement.Split`
  strides    (position, strides) of each whole operand that the bodies take in a layout that is not contiguous
  outs       how the body's outputs become results: literals of `result_kinds`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice, repeat
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.utils._pytree as pytree
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from mst_fx.core.graph_modules import layout_free
from mst_fx.core.sizes import any_length, is_symbolic
from mst_fx.core.torch_private.operators import (
    CHECKPOINTING_MODES,
    DispatchKey,
    HigherOrderOperator,
    below_autograd,
    current_dispatch_mode,
    redirect_to_mode,
    reenter_make_fx,
)
from mst_fx.core.torch_private.tracing import (
    FakeTensorMode,
    ProxyTorchDispatchMode,
    detect_fake_mode,
    disable_proxy_modes_tracing,
    track_tensor_tree,
)
from mst_fx.runtime.places import out_of_memory
from mst_fx.runtime.result_kinds import Axis, Cat, ResultKind, Rows, Sum, kind_of
from mst_fx.runtime.results import aligned, chunks_of, collector_of, example, laid_out

Body: TypeAlias = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


class LoopSpec(NamedTuple):
    """The literals of one loop (see the terms above); the graph holds `tuple(spec)`."""

    version: str
    chunk: int
    ins: tuple[Axis | None, ...]
    outs: tuple[tuple[Any, ...], ...]
    strides: tuple[tuple[int, tuple[int, ...]], ...] = ()


def axis_length(ins: Sequence[Axis | None], operands: Sequence[torch.Tensor]) -> int:
    """Return the length of the axis in positions."""
    x, (dim, outer, inner) = next((x, axis) for x, axis in zip(operands, ins, strict=True) if axis is not None)
    return x.shape[dim] // (outer * inner)


def run_loop(
    bodies: tuple[Body, Body | None],
    raw_spec: tuple[Any, ...],
    operands: list[torch.Tensor],
    overwrites: tuple[int, int] | None = None,
) -> list[Any]:
    """Run the loop and return its results. Generated code calls this with the bodies that it compiled.

    Args:
        bodies: of a full chunk and of the ragged last one; each takes a list of tensors and gives its outputs.
        raw_spec: a `LoopSpec` as a tuple.
        operands: the whole operands of the loop, all chunks in one.
        overwrites: a result, and the operand that it is written over: one that nobody reads after the loop, of which a
            chunk lies where the result has its own (see `overwriting`).

    Raises:
        torch.OutOfMemoryError: with the region and what to do added to its text.
    """
    try:
        return _results(bodies, LoopSpec(*raw_spec), operands, overwrites)
    except torch.OutOfMemoryError as error:
        error.args = (f"{error}\n{out_of_memory(raw_spec, operands)}",)
        raise


def _results(
    bodies: tuple[Body, Body | None], spec: LoopSpec, operands: list[torch.Tensor], overwrites: tuple[int, int] | None
) -> list[Any]:
    """Run the loop."""
    total = axis_length(spec.ins, operands)
    layouts = dict(spec.strides)
    chunks = [
        repeat(laid_out(x, layouts.get(position))) if axis is None else map(aligned, chunks_of(x, axis, spec.chunk))
        for position, (x, axis) in enumerate(zip(operands, spec.ins, strict=True))
    ]
    kinds = [kind_of(literal) for literal in spec.outs]
    last, memory = overwrites if overwrites is not None and operands[overwrites[1]].is_contiguous() else (-1, -1)
    order = sorted(range(len(kinds)), key=last.__eq__)  # the chunk that is overwritten may be an output, too
    collectors = [
        collector_of(kind, total, spec.chunk, operands[memory] if position == last else None)
        for position, kind in enumerate(kinds)
    ]
    for start in range(0, total, spec.chunk):
        body = bodies[0] if start + spec.chunk <= total else bodies[1]
        assert body is not None
        outs = iter(body([next(chunk) for chunk in chunks]))
        parts = [list(islice(outs, kind.outputs)) for kind in kinds]
        for position in order:
            collectors[position].add(iter(parts[position]))
        del outs, parts  # free this chunk before the next one starts
    # one after the other: this frees each float32 sum before it casts the next
    return [collectors.pop(0).finished() for _ in spec.outs]


class _MiniSequenceLoop(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__("mini_sequence_loop", cacheable=True)  # Inductor's FX graph cache accepts it

    def __call__(self, full: Any, tail: Any, spec: tuple[Any, ...], *operands: Any) -> tuple[torch.Tensor, ...]:
        return super().__call__(full, tail, spec, *operands)

    def dispatch(self, /, dispatch_key: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the loop op by op under a mode that does not support higher-order operators: the mode sees these ops."""
        mode = current_dispatch_mode() if dispatch_key == DispatchKey.Python else None
        unknown = mode is not None and type(mode) not in self.python_key_table
        if unknown and not getattr(mode, "supports_higher_order_operators", False):
            return _eager(*args)
        return super().dispatch(dispatch_key, *args, **kwargs)


mini_sequence_loop = _MiniSequenceLoop()

_to_save: ContextVar[list[Node] | None] = ContextVar("_to_save", default=None)


@contextmanager
def results_saved() -> Iterator[None]:
    """Let activation checkpointing save the results of loops that the block traces, where backward needs them."""
    nodes: list[Node] = []
    token = _to_save.set(nodes)
    try:
        yield
    finally:
        _to_save.reset(token)
    for node in nodes:  # only now: newer versions mark the nodes of an op when the op returns
        if node.meta.get("recompute") == CheckpointPolicy.PREFER_RECOMPUTE:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def chunk_examples(
    raw_spec: tuple[Any, ...], operands: Sequence[torch.Tensor], shape_env: Any
) -> list[list[torch.Tensor]]:
    """Return fake operands of a full chunk and of the ragged one, shaped and laid out as `run_loop` gives them.

    Call this under the operands' fake mode. Where the axis' length is only known at run time, the ragged length is a
    symbol of its own, so that it adds no guard.
    """
    spec = LoopSpec(*raw_spec)
    total = axis_length(spec.ins, operands)
    tail = any_length(shape_env) if is_symbolic(total) else total % spec.chunk
    layouts = dict(spec.strides)
    return [
        [
            example(x, axis, length, layouts.get(position))
            for position, (x, axis) in enumerate(zip(operands, spec.ins, strict=True))
        ]
        for length in (spec.chunk, tail)
    ]


class _Like(NamedTuple):
    """Shape, dtype and device of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


_outputs: WeakKeyDictionary[Any, dict[Any, list[_Like]]] = WeakKeyDictionary()


def _outputs_of(body: Any, examples: Sequence[torch.Tensor]) -> list[_Like]:
    """Return the shapes of a body's outputs for fake operands of one chunk; it runs once for operands that are alike.

    A compiler asks about five times for each loop, and a model has a loop in each layer.
    """
    sizes = [size for x in examples for size in (*x.shape, *x.stride())]
    symbolic = any(map(is_symbolic, sizes))  # symbols belong to one compile: the cache takes none
    known = {} if symbolic else _outputs.setdefault(body, {})
    key = None if symbolic else (*map(int, sizes), *((x.dim(), x.dtype, x.device) for x in examples))
    if key not in known:
        known[key] = [_Like(out.shape, out.dtype, out.device) for out in body(*examples)]
    return known[key]


@mini_sequence_loop.py_impl(DispatchKey.CompositeExplicitAutograd)
def _eager(full: Any, tail: Any, spec: tuple[Any, ...], *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    def unpacked(body: Any) -> Body:
        return lambda args: body(*args)

    return tuple(run_loop((unpacked(full), unpacked(tail) if tail is not None else None), spec, list(operands)))


@mini_sequence_loop.py_impl(FakeTensorMode)
def _fake(
    mode: FakeTensorMode, full: Any, tail: Any, spec: tuple[Any, ...], *operands: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    with mode:
        total = axis_length(LoopSpec(*spec).ins, operands)
        outs = iter(_outputs_of(full, chunk_examples(spec, operands, mode.shape_env)[0]))
        results = []
        for kind in map(kind_of, LoopSpec(*spec).outs):
            own = list(islice(outs, kind.outputs))
            shape, dtype = _shape_of(kind, own, total), kind.result if isinstance(kind, Sum) else own[0].dtype
            results.append(torch.empty(shape, dtype=dtype, device=own[0].device))
        return tuple(results)


def _shape_of(kind: ResultKind, outputs: Sequence[torch.Tensor | _Like], total: int) -> Sequence[int]:
    """Return the shape of a result that is made of these outputs of a body."""
    if isinstance(kind, Cat):
        return kind.shape(outputs[0].shape, total)
    return kind.shape(total) if isinstance(kind, Rows) else kind.shape([output.shape for output in outputs])


@mini_sequence_loop.py_impl(ProxyTorchDispatchMode)
def _proxy(mode: ProxyTorchDispatchMode, full: Any, tail: Any, spec: tuple[Any, ...], *operands: torch.Tensor) -> Any:
    """Trace the bodies again, so that their values live in the fake mode of the graph around them.

    A body that several loops share is traced once: the operands of these loops have the same shapes.
    """
    tracer: Any = mode.tracer
    fake_mode: Any = detect_fake_mode(operands)
    known: dict[Any, Any] = tracer.root.__dict__.setdefault("_mini_sequence_bodies", {})
    traced: list[Any] = [known.get(body) for body in (full, tail)]
    if any(body is not None and old is None for body, old in zip((full, tail), traced, strict=True)):
        with disable_proxy_modes_tracing(), fake_mode:
            examples = chunk_examples(spec, operands, fake_mode.shape_env)
        for position, (body, chunk) in enumerate(zip((full, tail), examples, strict=True)):
            if body is not None:
                traced[position] = reenter_make_fx(lambda *args, body=body: body(*args))(*chunk)
                for node in traced[position].graph.nodes:
                    node.target = layout_free(node.target)
                traced[position].recompile()
                tracer.root.register_module(tracer.get_fresh_qualname("mini_sequence_body"), traced[position])
                known[body] = known[traced[position]] = traced[position]
    args = pytree.tree_map(tracer.unwrap_proxy, (*traced, spec, *operands))
    proxy = tracer.create_proxy("call_function", mini_sequence_loop, args, {})
    with disable_proxy_modes_tracing():
        out = mini_sequence_loop(*traced, spec, *operands)
    tracked = track_tensor_tree(out, proxy, constant=None, tracer=tracer)
    to_save = _to_save.get()
    if to_save is not None:
        to_save += [proxy.node, *proxy.node.users]
    return tracked


@mini_sequence_loop.py_functionalize_impl
def _functional(ctx: Any, full: Any, tail: Any, spec: tuple[Any, ...], *operands: torch.Tensor) -> Any:
    unwrapped = ctx.unwrap_tensors(operands)
    with ctx.redispatch_to_next():
        return ctx.wrap_tensors(mini_sequence_loop(full, tail, spec, *unwrapped))


@mini_sequence_loop.py_autograd_impl
def _below_autograd(full: Any, tail: Any, spec: tuple[Any, ...], *operands: torch.Tensor) -> Any:
    """Run the loop without derivatives: `mini_sequence.mini_sequence` pairs a forward with a backward loop."""
    with below_autograd():
        return mini_sequence_loop(full, tail, spec, *operands)


# Under activation checkpointing the operator is an op like any other: recomputed, or saved if the policy says so.
for mode in CHECKPOINTING_MODES:
    redirect_to_mode(mini_sequence_loop, mode)
