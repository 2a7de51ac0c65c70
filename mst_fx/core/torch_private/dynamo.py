"""Dynamo and activation checkpointing around the pass: exceptions that are no errors, marks on functions, backends.

Names are looked up one by one where a version may lack them.

Private torch API: all of torch's names in this file. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
import torch.utils.checkpoint

from mst_fx.core.torch_private.captured import is_in_torch

_EXCEPTIONS = (
    (torch._dynamo.exc, "RestartAnalysis"),  # a number turned out to be fixed: Dynamo captures the program once more
    (torch._dynamo.exc, "TensorifyScalarRestartAnalysis"),
    (torch.utils.checkpoint, "_StopRecomputationError"),  # the checkpoint has all that it needs
)
PASSING: tuple[type[BaseException], ...] = tuple(
    getattr(module, name) for module, name in _EXCEPTIONS if hasattr(module, name)
)
"""Exceptions that are no errors; the pass lets them through."""


def backend_named(name: str) -> Any:
    """Return the backend that torch.compile knows under a name."""
    return torch._dynamo.lookup_backend(name)


def is_disabled(fn: Callable[..., Any]) -> bool:
    """Return whether the user told Dynamo to leave a function alone."""
    context = torch._dynamo.eval_frame.DisableContext
    return getattr(fn, "_torchdynamo_disable", False) or isinstance(getattr(fn, "dynamo_ctx", None), context)


def compiled_from(fn: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the function or module that a compiled one was made of; None if `fn` is not compiled."""
    wrapped = getattr(fn, "_orig_mod", None) or getattr(fn, "_torchdynamo_orig_callable", None)
    if wrapped is None and isinstance(fn, torch.nn.Module) and getattr(fn, "_compiled_call_impl", None) is not None:
        return fn._call_impl
    return wrapped


def given_up() -> list[Any]:
    """Return what torch keeps on record of the users' functions that Dynamo has left to eager execution, the last ones.

    They are those of the process, whatever the backend; none where torch keeps no such record.
    """
    failed = (record for record in _records() if record.fail_type not in (None, "SkipFrame"))
    return [record for record in failed if not is_in_torch(_named(record).co_filename or "")]


def reason_to_give_up(record: Any) -> str:
    """Return which function runs without a compile, and why: the first sentence of Dynamo's reason, and the line."""
    why = str(record.fail_reason or record.fail_type).strip().partition("\n")[0]
    file, line = record.fail_user_frame_filename, record.fail_user_frame_lineno
    if file:
        why += f" at {file}:{line}: {linecache.getline(file, line).strip()}"
    named = _named(record)
    function = f"{named.co_name} ({named.co_filename}:{named.co_firstlineno})" if named.co_name else "a function"
    return f"{function} has run without a compile, so that nothing of it was looped: {why}"


def _records() -> list[Any]:
    """Return what torch keeps on record of the last compiles; nothing where it keeps no such record."""
    return list(getattr(torch._dynamo.utils, "get_compilation_metrics", list)())


def _named(record: Any) -> Any:
    """Return the record that names a function: one beyond the limit of recompiles does not, but one before it does.

    torch numbers functions; `torch._dynamo.reset` begins anew.
    """
    before = takewhile(lambda other: other is not record, _records())
    number = str(record.compile_id).partition("/")[0]
    alike = [other for other in before if other.co_name and str(other.compile_id).partition("/")[0] == number]
    return alike[-1] if alike and not record.co_name else record
