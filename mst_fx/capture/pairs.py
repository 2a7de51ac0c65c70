"""Complex numbers inside of an aten graph -> pairs of real ones, as rotary embeddings are often written.

A product of complex numbers becomes four of real ones, with the derivative and the placement rules that these have. The
value of a pair has one dim more, of size 2, behind the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg
from torch.fx.traceback import set_current_meta
from torch.utils._pytree import tree_leaves

from mst_fx.core.aten_ops import ALIASES, aten
from mst_fx.core.graph_modules import layout_free


@dataclass(frozen=True)
class Pair:
    """A complex value: its real and imaginary parts, along the last dim of `parts`."""

    parts: torch.Tensor


def on_pairs(lowered: GraphModule) -> Callable[..., list[Any]] | None:
    """Return a function that computes what an aten graph does, on pairs; None where that is not needed, or not known.

    Args:
        lowered: the module that holds the graph; what it reads and returns stays as it is.
    """
    calls = [node for node in lowered.graph.nodes if node.op == "call_function"]
    returned = lowered.graph.output_node().all_input_nodes
    if not any(map(_is_complex, calls)) or any(map(_is_complex, returned)) or not all(map(_is_known, calls)):
        return None

    def run(*values: Any) -> list[Any]:
        given = iter(values)
        env: dict[Node, Any] = {}
        for node in lowered.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = getattr(lowered, str(node.target))
            elif node.op != "output":
                with set_current_meta(node):
                    env[node] = _computed(node, env)
        results: Any = lowered.graph.output_node().args[0]
        return [env[node] for node in results]

    return run


def _is_complex(node: Node) -> bool:
    return any(isinstance(x, torch.Tensor) and x.is_complex() for x in tree_leaves(node.meta.get("val")))


def _is_known(node: Node) -> bool:
    """Return whether a call reads and makes real values, or its op is known on pairs, and so are its operands."""
    if not any(map(_is_complex, (node, *node.all_input_nodes))):
        return True
    if node.target not in ON_PAIRS or node.kwargs or any(isinstance(x, complex) for x in tree_leaves(node.args)):
        return False
    outside = [operand.meta["val"] for operand in node.all_input_nodes if operand.op != "call_function"]
    return not any(x.is_conj() or x.is_neg() for x in outside)


def _computed(node: Node, env: Mapping[Node, Any]) -> Any:
    """Return the value of a call; complex ones that come from outside become pairs where they are read."""
    target: Any = node.target
    if not any(map(_is_complex, (node, *node.all_input_nodes))):
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        return layout_free(target)(*args, **kwargs)

    def read(operand: Node) -> Any:
        value = env[operand]
        from_outside = isinstance(value, torch.Tensor) and value.is_complex()
        return Pair(torch.view_as_real(value)) if from_outside else value

    args = map_arg(node.args, read)
    return ON_PAIRS[target](node, *args)


def _dim(node: Node, dim: int) -> int:
    """Return a dim of a pair's first operand, counted from the front."""
    operand: Any = node.args[0]
    return dim % operand.meta["val"].dim()


def _parts(value: Any) -> Any:
    """Return the parts of a value as two values; a real one has no second part."""
    return value.parts.unbind(-1) if isinstance(value, Pair) else (value, None)


def _multiplied(node: Node, x: Any, y: Any) -> Pair:
    (a, b), (c, d) = _parts(x), _parts(y)
    if b is None or d is None:
        pair, real = (y, x) if b is None else (x, y)
        return Pair(pair.parts * (real.unsqueeze(-1) if isinstance(real, torch.Tensor) else real))
    return Pair(torch.stack([a * c - b * d, a * d + b * c], -1))


def _reshaped(node: Node, x: Pair, sizes: list[int]) -> Pair:
    return Pair(x.parts.reshape([*node.meta["val"].shape, 2]))


ON_PAIRS: dict[Any, Callable[..., Any]] = {
    aten.view_as_complex.default: lambda node, x: Pair(x),
    aten.view_as_real.default: lambda node, x: x.parts,
    aten.mul.Tensor: _multiplied,
    aten.neg.default: lambda node, x: Pair(-x.parts),
    aten.clone.default: lambda node, x: Pair(x.parts.clone()),
    aten._conj.default: lambda node, x: Pair(torch.stack([x.parts[..., 0], -x.parts[..., 1]], -1)),
    aten.unsqueeze.default: lambda node, x, dim: Pair(x.parts.unsqueeze(dim % node.meta["val"].dim())),
    aten.squeeze.dim: lambda node, x, dim: Pair(x.parts.squeeze(_dim(node, dim))),
    aten.transpose.int: lambda node, x, a, b: Pair(x.parts.transpose(_dim(node, a), _dim(node, b))),
    aten.permute.default: lambda node, x, dims: Pair(x.parts.permute([*(_dim(node, d) for d in dims), len(dims)])),
    aten.slice.Tensor: lambda node, x, dim=0, *bounds: Pair(aten.slice.Tensor(x.parts, _dim(node, dim), *bounds)),
    aten.select.int: lambda node, x, dim, index: Pair(x.parts.select(_dim(node, dim), index)),
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _reshaped),
    aten.expand.default: lambda node, x, sizes: Pair(x.parts.expand([*node.meta["val"].shape, 2])),
    **dict.fromkeys(ALIASES, lambda node, x: x),
}
"""What an op computes on pairs, by its node and operands."""
