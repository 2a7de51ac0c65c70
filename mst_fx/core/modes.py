"""Which autocast blocks are open, and whether gradients are recorded, at each node of a captured graph.

A captured graph switches modes by nodes of their own, so a node's meaning depends on what stands before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node


@dataclass(frozen=True)
class Mode:
    """What is in force when a node runs, as far as the graph itself says.

    Attributes:
        grad: False inside the graph's own no_grad blocks.
        autocast: arguments of the open autocast blocks, outermost first.
    """

    grad: bool = True
    autocast: tuple[tuple[object, ...], ...] = ()


def modes_of(graph: Graph) -> dict[Node, Mode]:
    """The mode at every node."""
    modes: dict[Node, Mode] = {}
    grad = True
    blocks: list[tuple[Node, tuple[object, ...]]] = []
    for node in graph.nodes:
        modes[node] = Mode(grad, tuple(arguments for _, arguments in blocks))
        name = getattr(node.target, "__name__", "")
        if name == "_set_grad_enabled":
            grad = bool(node.args[0])
        elif name == "_enter_autocast":
            blocks.append((node, tuple(node.args)))
        elif name == "_exit_autocast":
            blocks = [block for block in blocks if block[0] is not node.args[0]]
    return modes
