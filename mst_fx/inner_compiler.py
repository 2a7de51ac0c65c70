"""The inner compiler takes the rewritten graph; `inner`, `mode` and foreign options of torch.compile choose and set it.

Private torch API: Inductor's entry points. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule

from mst_fx.core.config import Config

Compile: TypeAlias = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def inductor_options() -> frozenset[str]:
    """Return the names that Inductor takes as options."""
    from torch._inductor import list_options

    return frozenset(list_options())


def inner_compiler(config: Config, mode: str | None, options: dict[str, Any]) -> Compile:
    """Return the function that compiles the rewritten graph.

    Args:
        config: its `inner` chooses the compiler.
        mode: torch.compile's mode; Inductor or a callable takes it.
        options: torch.compile's options that are not ours; Inductor or a callable takes them.

    Raises:
        ValueError: a mode or option that `inner` does not take.
    """
    if config.inner == "inductor":
        return _inductor(mode, options)
    if callable(config.inner):
        given: dict[str, Any] = {"mode": mode, "options": options}
        given = {name: value for name, value in given.items() if value}
        chosen = config.inner
        return lambda gm, inputs: chosen(gm, inputs, **given)
    if options or mode:
        raise ValueError(f"mst_fx: inner={config.inner!r} takes neither a mode nor {sorted(options)}")
    compiler: Compile = torch._dynamo.lookup_backend(config.inner)  # type: ignore[assignment]
    return compiler


def _inductor(mode: str | None, options: dict[str, Any]) -> Compile:
    import torch._inductor.config as inductor
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **_cached_with_loops(inductor), **options}

    def compile_graph(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
        return compiled

    return compile_graph


def _cached_with_loops(inductor: Any) -> dict[str, Any]:
    """Name our call, with a version, to AOTAutograd's cache as cacheable; the key of a graph covers the bodies."""
    try:
        from mst_fx.runtime.cache_version import VERSION
        from mst_fx.runtime.mini_sequence import mini_sequence

        known = inductor.unsafe_marked_cacheable_functions
    except (ImportError, AttributeError):  # no loops, or no cache that asks
        return {}
    return {
        "unsafe_marked_cacheable_functions": {**known, f"{mini_sequence.__module__}.{mini_sequence.__name__}": VERSION}
    }


def writes_python(options: dict[str, Any]) -> bool:
    """Return whether Inductor's wrapper is Python, which the loop's lowering needs."""
    import torch._inductor.config as inductor

    return not options.get("cpp_wrapper", inductor.cpp_wrapper)
