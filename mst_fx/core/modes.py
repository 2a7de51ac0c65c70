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
        grad: False inside the graph's own no_grad blocks, and in those of inference mode.
        autocast: arguments of the open autocast blocks, outermost first.
        inference: whether inference mode is on.
        dual: whether a level of forward-mode AD is open.
    """

    grad: bool = True
    autocast: tuple[tuple[object, ...], ...] = ()
    inference: bool = False
    dual: bool = False


TOP = Mode()


def modes_of(graph: Graph, outer: Mode = TOP) -> dict[Node, Mode]:
    """The mode at every node.

    Args:
        graph: of a module or of a subgraph.
        outer: the mode that it runs in.
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
