"""The compiler of the rewritten graph; `inner`, `mode` and foreign options of torch.compile choose and set it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias

from torch.fx import GraphModule

from mst_fx.core.config import Config
from mst_fx.core.torch_private import dynamo, inductor

CUDA_GRAPHS = "triton.cudagraphs"
Compile: TypeAlias = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]

_of_our_backend: ContextVar[bool] = ContextVar("mst_fx_of_our_backend", default=False)


def is_of_our_backend() -> bool:
    """Return whether Inductor compiles a graph that the backend has been through."""
    return _of_our_backend.get()


def inner_compiler(config: Config, mode: str | None, options: dict[str, Any]) -> Compile:
    """Return the function that compiles the rewritten graph.

    Args:
        config: its `inner` chooses the compiler, and its `mode` is the mode where none is given.
        mode: torch.compile's mode; Inductor or a callable takes it.
        options: torch.compile's options that are not ours; Inductor or a callable takes them.

    Raises:
        ValueError: a mode or option that `inner` does not take.
    """
    mode = mode or config.mode
    chosen = _chosen(config, None if mode == "default" else mode, options)

    def compile_graph(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        token = _of_our_backend.set(True)
        try:
            return chosen(gm, inputs)
        finally:
            _of_our_backend.reset(token)

    return compile_graph


def _chosen(config: Config, mode: str | None, options: dict[str, Any]) -> Compile:
    if config.inner == "inductor":
        return _inductor(config, mode, options)
    if callable(config.inner):
        given: dict[str, Any] = {"mode": mode, "options": options}
        given = {name: value for name, value in given.items() if value}
        chosen = config.inner
        return lambda gm, inputs: chosen(gm, inputs, **given)
    if options or mode:
        names = ", ".join([*([f"mode={mode!r}"] if mode else []), *sorted(options)])
        raise ValueError(f"mst_fx: inner={config.inner!r} takes neither a mode nor options of Inductor: {names}")
    if config.offload and config.inner == "aot_eager":
        from mst_fx.core.torch_private.partition import aot_eager
        from mst_fx.runtime.offload_partition import OffloadPartition

        return lambda gm, inputs: aot_eager(gm, inputs, OffloadPartition())
    compiler: Compile = dynamo.backend_named(config.inner)
    return compiler


def _inductor(config: Config, mode: str | None, options: dict[str, Any]) -> Compile:
    all_options = {**(inductor.options_of_mode(mode) if mode else {}), **cached_with_loops(), **options}
    if config.offload:
        all_options |= partitioned(all_options)
    return lambda gm, inputs: inductor.compile_graph(gm, inputs, all_options)


def partitioned(options: dict[str, Any]) -> dict[str, Any]:
    """Return Inductor's option by which the partitioner sends values to the host, around the user's own partitioner.

    Args:
        options: of the compile.
    """
    from mst_fx.runtime.offload_partition import OffloadPartition

    own = options.get(inductor.PARTITIONER, inductor.option(inductor.PARTITIONER))
    return {inductor.PARTITIONER: own if isinstance(own, OffloadPartition) else OffloadPartition(own)}


def stays_on_device(config: Config, mode: str | None, options: dict[str, Any]) -> str | None:
    """Return why nothing can go to the host with this compiler, None where it can or need not.

    Args:
        config: the user's options.
        mode: of the compile.
        options: of the compile, those that are not ours.
    """
    if config.offload is None or config.inner == "aot_eager":
        return None
    if config.inner != "inductor":
        return f"inner={config.inner!r} has no place for a partitioner"
    if not inductor.has_option(inductor.PARTITIONER):
        return f"Inductor has no option {inductor.PARTITIONER!r}"
    mode = mode or config.mode
    if {**(inductor.options_of_mode(mode) if mode else {}), **options}.get(CUDA_GRAPHS, inductor.uses_cuda_graphs()):
        return "CUDA graphs replay copies from and to the same memory of the host, whatever it holds then"
    return None


def taken_partitioner(config: Config) -> str | None:
    """Return why nothing can go to the host under `enable`: a compile's own options have taken the place."""
    if config.offload is None:
        return None
    from mst_fx.runtime.offload_partition import OffloadPartition

    ours = isinstance(inductor.option(inductor.PARTITIONER), OffloadPartition)
    return None if ours else f"the compile has its own {inductor.PARTITIONER!r}"


def cached_with_loops() -> dict[str, Any]:
    """Name our calls, with a version, to AOTAutograd's cache as cacheable; the key of a graph covers the bodies."""
    try:
        from mst_fx.ops.shards import enter, leave
        from mst_fx.runtime.cache_version import VERSION
        from mst_fx.runtime.mini_sequence import mini_sequence

        known = inductor.option("unsafe_marked_cacheable_functions")
    except (ImportError, AttributeError):  # no loops, or no cache that asks
        return {}
    ours = {f"{call.__module__}.{call.__name__}": VERSION for call in (mini_sequence, enter, leave)}
    return {"unsafe_marked_cacheable_functions": {**known, **ours}}


def joins_collectives(options: dict[str, Any]) -> bool:
    """Return whether Inductor joins products with the collectives beside them (async tensor parallel)."""
    name = "_micro_pipeline_tp"
    return bool(options.get(name, inductor.has_option(name) and inductor.option(name)))


def writes_python(options: dict[str, Any]) -> bool:
    """Return whether Inductor's wrapper is Python, which the loop's lowering needs."""
    return not options.get("cpp_wrapper", inductor.option("cpp_wrapper"))
