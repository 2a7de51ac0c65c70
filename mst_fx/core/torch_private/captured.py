"""What Dynamo leaves on graphs and values that it has captured.

Private torch API: all of torch's names in this file. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass

make_graph_module = _make_graph_module
"""Make a graph module; within torch.compile it writes its code on the first run."""


def is_transformed(value: torch.Tensor) -> bool:
    """Return whether a value lives inside a transform of torch.func (vmap, ...) that was captured step by step."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def marked_dims(node: Node) -> Collection[int]:
    """Return the dims of an input of a graph that the user marked as varying (`mark_dynamic`)."""
    given = getattr(node.meta.get("grapharg"), "example", None)
    return getattr(given, "_dynamo_dynamic_indices", ())


def graph_break(gm: GraphModule) -> str:
    """Return why Dynamo ended a graph before the user's function ends, "" where the function ends with it.

    It is "" as well where torch does not leave the reason on the graph.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    return str(reason.reason) if reason is not None and reason.graph_break else ""
