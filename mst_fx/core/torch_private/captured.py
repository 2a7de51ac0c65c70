"""What Dynamo leaves on graphs and values that it has captured.

Private torch API: all of torch's names in this file. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass

make_graph_module = _make_graph_module
"""Make a graph module; within torch.compile it writes its code on the first run."""


_ROOT = os.path.join(torch.__path__[0], "")  # with a separator at the end: torchao is another library


def is_in_torch(file: str) -> bool:
    """Return whether a source file is one of torch itself."""
    return file.startswith(_ROOT)


is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
"""Return whether a value lives inside a transform of torch.func (vmap, ...) that was captured step by step."""


def unwrapped(value: torch.Tensor) -> torch.Tensor:
    """Return the value behind the transforms of torch.func, with the dims that these hide."""
    while is_transformed(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def marked_dims(node: Node) -> Collection[int]:
    """Return the dims of an input of a graph that the user marked as varying (`mark_dynamic`)."""
    given = getattr(node.meta.get("grapharg"), "example", None)
    return getattr(given, "_dynamo_dynamic_indices", ())


WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which torch's wrappers around parts of a model hold what they wrap."""

WRAPPED_MODEL = "module"
"""The name under which torch's wrappers around a whole model hold it."""


def source_of(node: Node) -> str:
    """Return Dynamo's text for where an input of a graph was found, "" where it is not known (any more)."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


@dataclass(frozen=True)
class Attempt:
    """One of Dynamo's attempts to compile a program: it begins anew where something turns out to be otherwise.

    Attributes:
        context: Dynamo's record of the compile; its name would not do, which a reset of Dynamo gives once more.
        number: of the attempt, from 0.
    """

    context: ref[Any]
    number: int

    def replaces(self, other: Attempt | None) -> bool:
        """Return whether it is a later attempt at the same compile."""
        return other is not None and self.context() is other.context() is not None and self.number > other.number


def attempt() -> Attempt | None:
    """Return the attempt that is under way, None outside of a compile, or where torch does not tell."""
    kind = getattr(torch._guards, "CompileContext", None)
    context = getattr(kind, "try_get", lambda: None)()
    return Attempt(ref(context), getattr(context, "attempt", 0)) if context is not None else None


def is_captured(gm: GraphModule) -> bool:
    """Return whether Dynamo hands this graph to a backend; False for a subgraph of one, and for any other graph."""
    return hasattr(gm, "compile_subgraph_reason")


def graph_break(gm: GraphModule) -> str:
    """Return why and where Dynamo ended a graph before the user's function ends, "" where the function ends, too.

    It is "" as well where torch does not leave the reason on the graph. A fragment has one: its values are read behind.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    return _told(reason) if reason is not None and reason.graph_break else ""


def is_fragment(gm: GraphModule) -> bool:
    """Return whether Dynamo has divided a captured graph for DDP, at its buckets of parameters, and this is one part.

    It is False as well where torch does not leave its mark on the part.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    return any(frame.name == "DDPOptimizer" for frame in getattr(reason, "user_stack", None) or ())


def is_input_of_whole(node: Node) -> bool:
    """Return whether an input of a fragment is one of the captured graph; another fragment makes the others."""
    return "grapharg" in node.meta


def break_at(file: str, line: int) -> str:
    """Return why Dynamo broke a graph at a line, and the line where it did; "" where it has no record of that."""
    for reason in reversed(getattr(torch._dynamo.utils, "graph_break_reasons", [])):
        if any((frame.filename, frame.lineno) == (file, line) for frame in reason.user_stack):
            return _told(reason)
    return ""


def _told(reason: Any) -> str:
    """Return a graph break in one line: the first sentence of Dynamo's reason, and the user's source line."""
    first = str(reason.reason).strip().partition("\n")[0]
    frames = [frame for frame in reason.user_stack or () if not is_in_torch(frame.filename)]
    return f"{first} at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else first
