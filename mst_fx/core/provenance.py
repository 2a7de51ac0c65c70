"""The user's source line of a node of a captured graph, and its op; what is before and behind the graph."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mst_fx.core.torch_private.captured import break_at, graph_break, is_fragment, is_in_torch

_FRAME = re.compile(r'File "(?P<file>.+?)", line (?P<line>\d+), in .*\n\s*(?P<code>.*)')
_RESUMED_NAME = "torch_dynamo_resume_in_"
_RESUMED = re.compile(rf'File "(?P<file>.+?)", line \d+, in {_RESUMED_NAME}.+?_at_(?P<line>\d+)')


@dataclass(frozen=True)
class Borders:
    """Where a graph's inputs come from, and where its outputs go.

    Attributes:
        within: what runs it as a subgraph, "" for a captured graph.
        break_before: the graph break that it goes on after, "" where there is none.
        break_after: the graph break that it ends in, "" where the user's function ends with it, and for a fragment.
        fragment: whether it is one fragment of a captured graph, which Dynamo has divided for DDP.
    """

    within: str = ""
    break_before: str = ""
    break_after: str = ""
    fragment: bool = False


TOP = Borders()


def borders_of(gm: GraphModule) -> Borders:
    """Return where the inputs of a captured graph come from, and where its outputs go."""
    fragment = is_fragment(gm)
    return Borders("", _break_before(gm), "" if fragment else graph_break(gm), fragment)


def _break_before(gm: GraphModule) -> str:
    """Return the graph break that a graph goes on after: its line is in the name that Dynamo gives the rest."""
    stacks = (node.meta.get("stack_trace") or "" for node in gm.graph.nodes if node.op.startswith("call_"))
    resumed = filter(lambda stack: _RESUMED_NAME in stack, stacks)  # the pattern takes longer to look for
    found = next((found for found in map(_RESUMED.search, resumed) if found), None)
    if found is None:
        return ""
    file, line = found["file"], int(found["line"])
    return break_at(file, line) or f"at {file}:{line}"


def source_line(node: Node) -> str:
    """Return `file:line: code` of the innermost frame outside torch, "" where Dynamo recorded none."""
    found = ""
    for frame in _FRAME.finditer(node.meta.get("stack_trace") or ""):
        if not is_in_torch(frame["file"]):
            found = f"{frame['file']}:{frame['line']}: {frame['code'].strip()}"
    return found


def op_name(node: Node) -> str:
    """Return the op as a user would write it: `torch.nn.functional.gelu`, `Tensor.view`, `library.Rounded.apply`."""
    if node.op not in ("call_function", "call_method"):
        return f"{node.op} {node.target}"
    target = getattr(node.target, "__wrapped__", node.target)
    if isinstance(target, str):
        return f"Tensor.{target}"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if (function := _applied(target)) is not None:
        return f"{function.__module__}.{function.__qualname__}.apply"
    module = (getattr(target, "__module__", None) or "").replace("torch._C._nn", "torch.nn.functional")
    name = getattr(target, "__name__", str(target))
    return f"{module.lstrip('_')}.{name}" if module else name


def _applied(target: Any) -> type[torch.autograd.Function] | None:
    """Return the custom autograd function that a function made by Dynamo calls; None for any other target."""
    if not isinstance(target, FunctionType) or not target.__module__.startswith("torch._dynamo"):
        return None
    held = (cell.cell_contents for cell in target.__closure__ or ())
    return next((x for x in held if isinstance(x, type) and issubclass(x, torch.autograd.Function)), None)
