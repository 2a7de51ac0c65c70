"""An error inside the pass costs the loop that it hits, never the compile; a warning and the report tell it."""

from __future__ import annotations

import logging
import re
from types import ModuleType

import torch
from torch.fx import Node

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.torch_private.dynamo import PASSING

log = logging.getLogger("mst_fx")

OLDEST = (2, 11)
"""The oldest version of torch that the pass was run on."""


def refusal_for(error: Exception, node: Node | None, doing: str, *, strict: bool) -> Refusal:
    """Log an exception, one line as a warning and the traceback as a debug message; return it as a refusal.

    Args:
        error: the exception, while it is handled.
        node: the node of the captured graph that it hit, None where that is not known.
        doing: what failed.
        strict: raise the exception.

    Raises:
        Exception: `error` itself, if `strict` is set or it is one of PASSING.
    """
    if strict or isinstance(error, PASSING):
        raise error
    name = missing_name(error)
    words = f"{doing}: {words_of(error)}" if name is None else f"{doing}: torch {torch.__version__} has no {name}"
    log.warning("mst_fx: %s; not looped", words)
    log.debug("mst_fx: %s", words, exc_info=error)
    return Refusal(Reason.INTERNAL if name is None else Reason.TORCH, node, words)


def unfit_torch() -> str | None:
    """Return why there are no loops with a torch that is too old, None with any other; it is a warning, too."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or (int(found[1]), int(found[2])) >= OLDEST:
        return None
    text = f"mst_fx needs torch {'.'.join(map(str, OLDEST))} or newer, and this is {torch.__version__}"
    log.warning("mst_fx: %s; not looped", text)
    return text


def missing_name(error: BaseException | None) -> str | None:
    """Return the name that torch lacks, if that caused the error; else None."""
    while error is not None:
        if isinstance(error, ImportError) and _is_of_torch(error.name):
            return str(error).removeprefix("cannot import name ").partition(" (")[0]
        op = re.search(r"'_OpNamespace' '(\w+)' object has no attribute '(\w+)'", str(error))
        if op is not None:
            return f"torch.ops.{op[1]}.{op[2]}"
        owner = getattr(error, "obj", None)
        if isinstance(error, AttributeError) and isinstance(owner, ModuleType) and _is_of_torch(owner.__name__):
            return f"{owner.__name__}.{error.name}"
        error = error.__cause__
    return None


def _is_of_torch(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch"


def words_of(error: Exception) -> str:
    """Return an exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
