"""What is known of a captured value: fake tensors and plain values.

Private torch API: fake tensors, and those of torch.func's transforms. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mst_fx.core.sizes import Hint, hint

HALF = (torch.float16, torch.bfloat16)


def fake_value(node: Node) -> Any:
    """What the node produced when the graph was captured: fake tensors and plain values."""
    return node.meta.get("example_value")


def is_fake(value: torch.Tensor) -> bool:
    """Whether a value has no memory, as one of a graph that was captured."""
    return isinstance(value, torch._subclasses.FakeTensor)


def is_transformed(value: torch.Tensor) -> bool:
    """Whether a value lives inside of a vmap, or another transform of torch.func, that was captured step by step."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def tensors_of(node: Node) -> list[torch.Tensor]:
    """The tensors that a node produced when it was captured, one or several."""
    value = fake_value(node)
    return [x for x in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(x, torch.Tensor)]


def storages_of(node: Node) -> set[torch.UntypedStorage]:
    """The memory that the node's value lies in, as captured; none inside a transform."""
    tensors = [tensor for tensor in tensors_of(node) if tensor.layout == torch.strided]
    return {tensor.untyped_storage() for tensor in tensors if not is_transformed(tensor)}


def storages_of_all(nodes: Iterable[Node]) -> set[torch.UntypedStorage]:
    """The memory that the values of several nodes lie in."""
    return set().union(*map(storages_of, nodes))


def is_view(node: Node) -> bool:
    """Whether the node's value lies in the memory of its operands."""
    own = storages_of(node)
    return bool(own) and own <= storages_of_all(node.all_input_nodes)


def is_sharded(value: object) -> bool:
    """Whether a value is a DTensor: its ops communicate, and keep what they saw for the whole process."""
    distributed = sys.modules.get("torch.distributed.tensor")  # nobody has made one where nobody has loaded it
    return distributed is not None and isinstance(value, distributed.DTensor)


def is_wrapper(value: torch.Tensor) -> bool:
    """Whether a value is made of other tensors, as nested and quantised ones are."""
    return is_traceable_wrapper_subclass(value)


def bytes_of(value: torch.Tensor, at: Hint = hint) -> int:
    """Bytes of a value, of the lengths that `at` tells."""
    return at(value.numel()) * value.element_size()


def bytes_made(node: Node, at: Hint = hint) -> int:
    """Bytes of what a node of an aten graph makes, added up where it makes several values; 0 for what is no tensor."""
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else [value]
    return sum(bytes_of(part, at) for part in parts if isinstance(part, torch.Tensor))


def has_gradient(node: Node) -> bool:
    """Whether the value needed a gradient when it was captured; of several values, whether one did."""
    return any(part.requires_grad for part in tensors_of(node))


def sizes_of(gm: GraphModule) -> Iterator[Any]:
    """The sizes, and other numbers, that a graph is given."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = fake_value(node)
        yield from value.shape if isinstance(value, torch.Tensor) else (value,)


def marked_sizes(gm: GraphModule) -> frozenset[str]:
    """The sizes that the user has marked as varying (`mark_dynamic`): to fix one of them is an error."""
    marked: set[str] = set()
    for node in gm.graph.nodes:
        given = getattr(node.meta.get("grapharg"), "example", None)
        marked.update(str(fake_value(node).shape[dim]) for dim in getattr(given, "_dynamo_dynamic_indices", ()))
    return frozenset(marked)
