"""The modes at each node of a captured graph: its autocast blocks, and whether it records gradients.

A captured graph switches modes by nodes, so the meaning of a node depends on the nodes before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node


@dataclass(frozen=True)
class Mode:
    """The modes in which a node runs, as far as the graph itself sets them.

    Attributes:
        grad: False inside the graph's own no_grad blocks, and in those of inference mode.
        autocast: arguments of the autocast blocks around the node, outermost first.
        inference: whether inference mode is on.
        dual: whether the node is inside a level of forward-mode AD.
    """

    grad: bool = True
    autocast: tuple[tuple[object, ...], ...] = ()
    inference: bool = False
    dual: bool = False


TOP = Mode()


def modes_of(graph: Graph, outer: Mode = TOP) -> dict[Node, Mode]:
    """Return the mode at every node.

    Args:
        graph: the graph of a module or of a subgraph.
        outer: the mode in which the graph runs.
    """
    modes: dict[Node, Mode] = {}
    grad = outer.grad
    blocks: list[tuple[Node, tuple[object, ...]]] = []
    inference: dict[Node, bool] = {}
    levels = int(outer.dual)
    for node in graph.nodes:
        autocast = (*outer.autocast, *(arguments for _, arguments in blocks))
        infers = next(reversed(inference.values()), outer.inference)
        modes[node] = Mode(grad and not infers, autocast, infers, levels > 0)
        name = getattr(node.target, "__name__", "")
        if name == "_set_grad_enabled":
            grad = bool(node.args[0])
        elif name == "_enter_autocast":
            blocks.append((node, tuple(node.args)))
        elif name == "_exit_autocast":
            blocks = [block for block in blocks if block[0] is not node.args[0]]
        elif name == "_enter_inference_mode":
            inference[node] = bool(node.args[0])
        elif name == "_exit_inference_mode":
            inference.pop(node.args[0], None)
        elif name == "_enter_dual_level":
            levels += 1
        elif name == "_exit_dual_level":
            levels -= 1
    return modes
