"""The loop operator: a chunk body, run by the host over the mini-sequences, with in-place accumulation.

`mini_sequence_loop(full, tail, spec, *operands)` stays one node of the graph until Inductor, so nothing can reorder or
fuse the chunks until all of them are alive.

Terms
  body       an aten graph module that computes one mini-sequence
  full, tail the bodies for a full chunk and for the ragged last one (None where the length divides)
  spec       (version, chunk, ins, outs, strides): plain literals, so that graphs, cache keys and generated code can
             hold it
  ins        for each operand None (whole) or (dim, outer, inner), as in `placement.Split`
  strides    for whole operands that bodies take in another layout than the contiguous one, (position, strides)
  outs       how the body's outputs become results: literals of `result_kinds`

Private torch API: the registration of a higher-order operator, and the marks of activation checkpointing on its nodes.
Run on torch 2.11, 2.13 and 2.15.
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
from torch._C import DispatchKey
from torch._guards import detect_fake_mode
from torch._higher_order_ops.utils import redirect_to_mode, reenter_make_fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, disable_proxy_modes_tracing, track_tensor_tree
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import CheckpointPolicy, _CachedTorchDispatchMode, _CachingTorchDispatchMode

from mst_fx.core.graph_modules import layout_free
from mst_fx.core.sizes import any_length, is_symbolic
from mst_fx.runtime.result_kinds import Axis, Cat, Outer, ResultKind, Rows, Sum, kind_of
from mst_fx.runtime.results import aligned, example, laid_out, pieces, result_of

Body: TypeAlias = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


class LoopSpec(NamedTuple):
    """The literals of one loop; `tuple(spec)` is what the graph holds."""

    version: str
    chunk: int
    ins: tuple[Axis | None, ...]
    outs: tuple[tuple[Any, ...], ...]
    strides: tuple[tuple[int, tuple[int, ...]], ...] = ()


def axis_length(ins: Sequence[Axis | None], operands: Sequence[torch.Tensor]) -> int:
    """Length of the axis."""
    x, (dim, outer, inner) = next((x, axis) for x, axis in zip(operands, ins, strict=True) if axis is not None)
    return x.shape[dim] // (outer * inner)


def run_loop(bodies: tuple[Body, Body | None], raw_spec: tuple[Any, ...], operands: list[torch.Tensor]) -> list[Any]:
    """Run the loop. Generated code calls this with the bodies that it compiled."""
    spec = LoopSpec(*raw_spec)
    total = axis_length(spec.ins, operands)
    layouts = dict(spec.strides)
    chunks = [
        repeat(laid_out(x, layouts.get(position))) if axis is None else map(aligned, pieces(x, axis, spec.chunk))
        for position, (x, axis) in enumerate(zip(operands, spec.ins, strict=True))
    ]
    results = [result_of(kind_of(literal), total, spec.chunk) for literal in spec.outs]
    for start in range(0, total, spec.chunk):
        body = bodies[0] if start + spec.chunk <= total else bodies[1]
        assert body is not None
        outs = iter(body([next(chunk) for chunk in chunks]))
        for result in results:
            result.add(outs)
        del outs  # free this chunk before the next one starts
    # one after the other: a float32 sum is freed before the next is cast
    return [results.pop(0).finished() for _ in spec.outs]


class _MiniSequenceLoop(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__("mini_sequence_loop", cacheable=True)  # Inductor's FX graph cache accepts it

    def __call__(self, full: Any, tail: Any, spec: tuple[Any, ...], *operands: Any) -> tuple[torch.Tensor, ...]:
        return super().__call__(full, tail, spec, *operands)

    def dispatch(self, /, dispatch_key: Any, *args: Any, **kwargs: Any) -> Any:
        """A mode that knows no such operators, of the user's or one that counts, sees the ops that the loop runs."""
        mode = _get_current_dispatch_mode() if dispatch_key == DispatchKey.Python else None
        unknown = mode is not None and type(mode) not in self.python_key_table
        if unknown and not getattr(mode, "supports_higher_order_operators", False):
            return _eager(*args)
        return super().dispatch(dispatch_key, *args, **kwargs)


mini_sequence_loop = _MiniSequenceLoop()

_kept: ContextVar[list[Node] | None] = ContextVar("_kept", default=None)


@contextmanager
def results_kept() -> Iterator[None]:
    """Activation checkpointing keeps what loops traced here give, as if the policy were to save it if it is needed."""
    nodes: list[Node] = []
    token = _kept.set(nodes)
    try:
        yield
    finally:
        _kept.reset(token)
    for node in nodes:  # only now: newer versions mark what an op has traced when it returns
        if node.meta.get("recompute") == CheckpointPolicy.PREFER_RECOMPUTE:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def chunk_examples(
    raw_spec: tuple[Any, ...], operands: Sequence[torch.Tensor], shape_env: Any
) -> list[list[torch.Tensor]]:
    """Fake operands of a full chunk and of the ragged one, as `run_loop` hands them on; call it under their fake mode.

    The ragged length is a symbol of its own where the axis' length is only known at run time, so no guard comes of it.
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
    """What is known of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


_outputs: WeakKeyDictionary[Any, dict[Any, list[_Like]]] = WeakKeyDictionary()


def _outputs_of(body: Any, examples: Sequence[torch.Tensor]) -> list[_Like]:
    """What a body gives for fake operands of one chunk; run once for operands that are alike.

    A compiler asks for it about five times a loop, and a model has a loop a layer.
    """
    sizes = [size for x in examples for size in (*x.shape, *x.stride())]
    symbolic = any(map(is_symbolic, sizes))  # of one compile alone: not to be kept
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
            parts = list(islice(outs, kind.outputs))
            shape, dtype = _shape_of(kind, parts, total), kind.result if isinstance(kind, Sum) else parts[0].dtype
            results.append(torch.empty(shape, dtype=dtype, device=parts[0].device))
        return tuple(results)


def _shape_of(kind: ResultKind, parts: Sequence[torch.Tensor | _Like], total: int) -> Sequence[int]:
    """Sizes of a result that is made of these outputs of a body."""
    if isinstance(kind, Cat):
        return kind.shape(parts[0].shape, total)
    if isinstance(kind, Rows):
        return kind.shape(total)
    return [part.shape[1] for part in parts] if isinstance(kind, Outer) else parts[0].shape


@mini_sequence_loop.py_impl(ProxyTorchDispatchMode)
def _proxy(mode: ProxyTorchDispatchMode, full: Any, tail: Any, spec: tuple[Any, ...], *operands: torch.Tensor) -> Any:
    """The bodies are traced again, so that their values live in the fake mode of the graph around them.

    One that several loops share is traced once: operands of its loops have the same shapes.
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
    kept = _kept.get()
    if kept is not None:
        kept += [proxy.node, *proxy.node.users]
    return tracked


@mini_sequence_loop.py_functionalize_impl
def _functional(ctx: Any, full: Any, tail: Any, spec: tuple[Any, ...], *operands: torch.Tensor) -> Any:
    unwrapped = ctx.unwrap_tensors(operands)
    with ctx.redispatch_to_next():
        return ctx.wrap_tensors(mini_sequence_loop(full, tail, spec, *unwrapped))


@mini_sequence_loop.py_autograd_impl
def _below_autograd(full: Any, tail: Any, spec: tuple[Any, ...], *operands: torch.Tensor) -> Any:
    """Derivatives are the caller's: `mini_sequence.mini_sequence` pairs a forward with a backward loop."""
    with torch._C._AutoDispatchBelowAutograd():
        return mini_sequence_loop(full, tail, spec, *operands)


# Under activation checkpointing the operator is one op like any other: recomputed, or kept if the policy says so.
redirect_to_mode(mini_sequence_loop, _CachingTorchDispatchMode)
redirect_to_mode(mini_sequence_loop, _CachedTorchDispatchMode)
