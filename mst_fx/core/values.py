"""Facts about captured values: fake tensors and plain values."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mst_fx.core.sizes import Hint, hint
from mst_fx.core.torch_private.captured import FakeTensor, is_traceable_wrapper_subclass, is_transformed, marked_dims

HALF = (torch.float16, torch.bfloat16)


def fake_value(node: Node) -> Any:
    """Return the node's value as captured: fake tensors and plain values; None if it has none."""
    return node.meta.get("example_value")


def is_fake(value: torch.Tensor) -> bool:
    """Return whether a value is a fake tensor, without memory, as those of a captured graph are."""
    return isinstance(value, FakeTensor)


def tensors_of(node: Node) -> list[torch.Tensor]:
    """Return the tensors, one or several, that a node gave when it was captured.

    Of an operator over graphs these are the tensors that somebody reads: torch 2.11 lists what it saves as well.
    """
    value = fake_value(node)
    if isinstance(value, torch.Tensor):
        return [value]
    values = value if isinstance(value, (tuple, list)) else [value]
    if isinstance(node.target, torch._ops.HigherOrderOperator) and values is value:
        read = {user.args[1] for user in node.users if user.target is operator.getitem}
        values = [x for position, x in enumerate(values) if position in read]
    return [x for x in values if isinstance(x, torch.Tensor)]


def storages_of(node: Node) -> set[torch.UntypedStorage]:
    """Return the memory that the node's value lies in, as captured; none inside a transform."""
    value = fake_value(node)
    if type(value) is FakeTensor:  # nearly always: it wraps no other tensor
        return {value.untyped_storage()} if value.layout == torch.strided else set()
    tensors = [plain for tensor in tensors_of(node) for plain in plain_tensors(tensor)]
    return {x.untyped_storage() for x in tensors if x.layout == torch.strided and not is_transformed(x)}


def storages_of_all(nodes: Iterable[Node]) -> set[torch.UntypedStorage]:
    """Return the memory that the values of several nodes lie in."""
    return set().union(*map(storages_of, nodes))


def is_view(node: Node) -> bool:
    """Return whether the node's value lies in the memory of its operands."""
    own = storages_of(node)
    return bool(own) and own <= storages_of_all(node.all_input_nodes)


def is_sharded(value: object) -> bool:
    """Return whether a value is a DTensor: its ops communicate, and cache what they saw for the whole process."""
    distributed = sys.modules.get("torch.distributed.tensor")  # without the module there are no DTensors
    return distributed is not None and isinstance(value, distributed.DTensor)


def is_wrapper(value: torch.Tensor) -> bool:
    """Return whether a value wraps other tensors, as nested and quantised tensors do."""
    return is_traceable_wrapper_subclass(value)


def plain_tensors(value: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that a value wraps; the value itself where it wraps none."""
    if not is_wrapper(value):
        return [value]
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = (getattr(value, name) for name in names)  # a DTensor names its mesh as well
    return [plain for part in parts if isinstance(part, torch.Tensor) for plain in plain_tensors(part)]


def bytes_of(value: torch.Tensor, at: Hint = hint) -> int:
    """Return the bytes of a value, at the sizes that `at` gives."""
    return at(value.numel()) * value.element_size()


def bytes_made(node: Node, at: Hint = hint) -> int:
    """Return the bytes of all tensors that a node of an aten graph makes; 0 if it makes none."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return sum(bytes_of(x, at) for x in values if isinstance(x, torch.Tensor))


def has_gradient(node: Node) -> bool:
    """Return whether the value, or one of several values, needed a gradient when it was captured."""
    return any(x.requires_grad for x in tensors_of(node))


def sizes_of(gm: GraphModule) -> Iterator[Any]:
    """Yield the sizes of a graph's inputs, and its other inputs as they are."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = fake_value(node)
        yield from value.shape if isinstance(value, torch.Tensor) else (value,)


def marked_sizes(gm: GraphModule) -> frozenset[str]:
    """Return the sizes that the user marked as varying (`mark_dynamic`): fixing one of them is an error."""
    marked: set[str] = set()
    for node in gm.graph.nodes:
        marked.update(str(fake_value(node).shape[dim]) for dim in marked_dims(node))
    return frozenset(marked)
