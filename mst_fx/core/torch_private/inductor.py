"""Inductor's entry points, and what it needs of a machine; Inductor itself is loaded on the first use.

Private torch API: all of torch's names in this file. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

PARTITIONER = "custom_partitioner_fn"
"""The option for another partitioner of joint graphs."""


def option_names() -> frozenset[str]:
    """Return the names that Inductor takes as options."""
    from torch._inductor import list_options

    return frozenset(list_options())


def options_of_mode(mode: str) -> dict[str, Any]:
    """Return the options that one of torch.compile's modes stands for."""
    from torch._inductor import list_mode_options

    return list_mode_options(mode)


def option(name: str) -> Any:
    """Return the value that an option has now."""
    from torch._inductor import config

    return getattr(config, name)


def set_option(name: str, value: Any) -> None:
    """Set an option for every compile of the process."""
    from torch._inductor import config

    setattr(config, name, value)


def has_option(name: str) -> bool:
    """Return whether this version has an option."""
    from torch._inductor import config

    return hasattr(config, name)


def uses_cuda_graphs() -> bool:
    """Return whether compiled code runs as CUDA graphs now."""
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def register_pass(kind: type) -> None:
    """Let Inductor take a class as one of passes on graphs that tell its caches their version (`uuid`)."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    CustomGraphPass.register(kind)


def compile_graph(gm: GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Compile a graph."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, list(inputs), config_patches=options)
    return compiled


def missing_compiler(device: str) -> str | None:
    """Return what Inductor lacks to compile for a kind of device, in words; None where it has all, or cannot tell."""
    if device == "cpu":
        return _missing_cpp()
    if device not in ("cuda", "xpu"):
        return None
    try:
        from torch.utils._triton import has_triton
    except ImportError:
        return None
    return None if has_triton() else "Triton"


def _missing_cpp() -> str | None:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:
        return None
    try:
        get_cpp_compiler()
    except Exception:
        return "a C++ compiler"
    return None


def cache_folder() -> str | None:
    """Return the folder of Inductor's caches; None where this version does not tell."""
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir
    except ImportError:
        return None
    folder: str = cache_dir()
    return folder
