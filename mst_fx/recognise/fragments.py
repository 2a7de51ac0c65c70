"""Large values that leave a fragment: for DDP, Dynamo has divided the captured graph at its buckets of parameters.

A fragment is compiled by itself, so no region reaches into the next one.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch.fx import Node

from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.torch_private.captured import is_input_of_whole
from mst_fx.core.values import tensors_of
from mst_fx.recognise.growth import grow
from mst_fx.recognise.reader import Reader

DIVIDED = "Dynamo has divided the graph for DDP, at its buckets of parameters"


def leaving(node: Node) -> Refusal:
    """Return the refusal of a large value that leaves a fragment."""
    return Refusal(Reason.DDP, node, f"{op_name(node)} makes a large value that leaves this fragment: {DIVIDED}")


def comes_from_another(reader: Reader, nodes: Iterable[Node]) -> bool:
    """Return whether another fragment has made a tensor among the nodes."""
    inputs = [node for node in nodes if node.op == "placeholder" and tensors_of(node)]
    return reader.borders.fragment and not all(map(is_input_of_whole, inputs))


def cut_off(reader: Reader, taken: Container[Node]) -> list[Refusal]:
    """Return a refusal for each projection of a fragment whose large values leave it: no pattern has it as a region.

    Args:
        reader: of the graph; it remembers the refusals.
        taken: the nodes of regions.
    """
    refusals, seen = list[Refusal](), set[Node]()
    for node in reader.owner.graph.nodes if reader.borders.fragment else ():
        up = reader.widening(node) if node not in taken and node not in seen else None
        growth = grow(reader, node, up.activation) if up is not None else None
        if growth is None or growth.sinks or not growth.returned:
            continue
        refusal = leaving(node)
        reader.unmatched.refuse(growth.nodes, refusal)
        seen.update(growth.nodes)
        refusals.append(refusal)
    return refusals
