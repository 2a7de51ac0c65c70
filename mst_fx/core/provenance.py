"""The module's path and the user's source line of a node of a captured graph."""

from __future__ import annotations

import re

import torch
from torch.fx import Node

_TORCH_ROOT = torch.__path__[0]
_FRAME = re.compile(r'File "(?P<file>.+?)", line (?P<line>\d+), in .*\n\s*(?P<code>.*)')


def module_path(node: Node) -> str:
    """Return the dotted path of the innermost module around the node ("model.layers.0.mlp"), "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)  # L['self'].layers[0] -> L.self.layers.0
    path = re.sub(r"_modules\.|_buffers\.|_parameters\.", "", path)
    return re.sub(r"^[LG]\.\w+\.?", "", path)


def source_line(node: Node) -> str:
    """Return `file:line: code` of the innermost frame outside torch, "" where Dynamo recorded none."""
    found = ""
    for frame in _FRAME.finditer(node.meta.get("stack_trace") or ""):
        if not frame["file"].startswith(_TORCH_ROOT):
            found = f"{frame['file']}:{frame['line']}: {frame['code'].strip()}"
    return found


def op_name(node: Node) -> str:
    """Return the op as a user would write it: `torch.nn.functional.gelu`, `Tensor.view`."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op != "call_function":
        return f"{node.op} {node.target}"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = (getattr(target, "__module__", None) or "").replace("torch._C._nn", "torch.nn.functional")
    name = getattr(target, "__name__", str(target))
    return f"{module.lstrip('_')}.{name}" if module else name
