"""A graph -> its segments, and the bytes of its inputs and outputs, for the timeline of a step (`step_memory`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from mst_fx.core.sizes import Hint
from mst_fx.core.values import bytes_of, fake_value, has_gradient, storages_of_all, tensors_of
from mst_fx.predict.saved_activations import activation_bytes, passing_bytes, saved_values
from mst_fx.predict.step_memory import Segment
from mst_fx.recognise.reader import Reader

ADDED_AT_ONCE = 9
"""The number of gradients of one parameter that Inductor adds up in one kernel; it writes the sum of more than that."""


def segments_of(
    reader: Reader,
    regions: Mapping[Node, int],
    blocks: Mapping[Node, Sequence[Segment]],
    at: Hint,
    *,
    away: Callable[[Node], int],
) -> list[Segment]:
    """Return the segments of one graph.

    Args:
        reader: of the graph.
        regions: the number of the region of each node that belongs to one.
        blocks: the segments of the subgraphs that nodes of the graph run (such as checkpointed blocks).
        at: tells sizes that vary.
        away: gives the bytes that may go to the host of what a node saves that runs a block or begins a region.
    """
    made = _gradients(reader, regions, at)
    saved = saved_values(reader, regions, blocks, at)
    found: list[Segment] = []
    place: dict[int, int] = {}
    current = Segment()
    for node in reader.owner.graph.nodes:
        gradients = made.get(node, 0)
        if node in regions:
            number = regions[node]
            if number not in place:
                found += [current, Segment(region=number, away=away(node))]
                place[number] = len(found) - 1
                current = Segment()
            current = _with_saved(current, node, saved)
            own = found[place[number]]
            upstream = own.upstream + _upstream_bytes(node, regions, at)
            found[place[number]] = replace(own, gradients=own.gradients + gradients, upstream=upstream)
        elif node in blocks:
            inner = list(blocks[node]) or [Segment()]
            inner[0] = replace(inner[0], entry=inner[0].entry + activation_bytes(node, at), away=away(node))
            found += [current, *inner]
            current = _with_saved(Segment(), node, saved)
        else:
            current = _with_saved(replace(current, gradients=current.gradients + gradients), node, saved)
            passing = passing_bytes(reader, node, at)
            current = replace(current, passing=passing, widest=node) if passing > current.passing else current
    return [*found, current]


def bytes_unlooped(reader: Reader, nodes: Collection[Node], at: Hint) -> tuple[int, int]:
    """Return the bytes that nodes save for backward if no region has them, and the most that one needs besides.

    Args:
        reader: of their graph.
        nodes: of one region.
        at: tells sizes that vary.
    """
    key = (bytes_unlooped, at)
    if key not in reader.remembered:
        reader.remembered[key] = saved_values(reader, {}, (), at)
    saved = reader.remembered[key]
    return sum(saved.get(node, 0) for node in nodes), max(passing_bytes(reader, node, at) for node in nodes)


def _upstream_bytes(node: Node, regions: Mapping[Node, int], at: Hint) -> int:
    """Return the bytes of the gradient of a region's node that nodes behind the region make, not the graph's caller."""
    behind = (user for user in node.users if regions.get(user) != regions[node])
    return sum(bytes_of(x, at) for x in tensors_of(node) if x.requires_grad) if any(map(has_gradient, behind)) else 0


def _with_saved(segment: Segment, node: Node, saved: Mapping[Node, int]) -> Segment:
    """Return the segment with what it saves of a node's value."""
    size = saved.get(node, 0)
    return replace(segment, saved=segment.saved + size, values=(*segment.values, (node, size))) if size else segment


def resident_bytes(reader: Reader, at: Hint) -> int:
    """Return the bytes of the graph's inputs, shared memory counted once."""
    return _storage_bytes(_inputs(reader), at)


def parameter_bytes(reader: Reader, at: Hint) -> int:
    """Return the bytes of those inputs that are parameters, shared memory counted once."""
    parameters = [node for node in _inputs(reader) if isinstance(fake_value(node), torch.nn.Parameter)]
    return _storage_bytes(parameters, at)


def returned_bytes(reader: Reader, at: Hint) -> int:
    """Return the bytes of the graph's outputs, shared memory counted once."""
    return _storage_bytes(reader.owner.graph.output_node().all_input_nodes, at)


def _storage_bytes(nodes: Sequence[Node], at: Hint) -> int:
    storages = storages_of_all(nodes)
    return sum(at(storage.nbytes()) for storage in storages)


def _inputs(reader: Reader) -> list[Node]:
    return [node for node in reader.owner.graph.nodes if node.op in ("placeholder", "get_attr")]


def _gradients(reader: Reader, regions: Mapping[Node, int], at: Hint) -> Mapping[Node, int]:
    """Return the bytes of the gradients of parameters, by the nodes whose backward makes them.

    Backward makes one for each reader of a parameter, and a compiler adds them up at the end, in one kernel. Inside of
    a block its own nodes are the readers.
    """
    gradients: Counter[Node] = Counter()
    for node in _inputs(reader):
        value = fake_value(node)
        if isinstance(value, torch.nn.Parameter) and value.requires_grad:
            readers = (user for user in sorted(node.users, key=reader.order.__getitem__) if has_gradient(user))
            parts = {regions.get(user, user): user for user in readers}
            for user in list(parts.values())[-ADDED_AT_ONCE:]:
                gradients[user] += bytes_of(value, at)
    return gradients
