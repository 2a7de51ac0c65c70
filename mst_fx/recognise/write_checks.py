"""Refusals of writes around a region whose meaning would change if a loop replaced it.

The program reads and writes in the order of its lines. A loop reads everything in one place of the graph, reads it
again in the backward, and gives results in memory of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import BILINEAR
from mst_fx.core.graph_walk import ancestors
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.values import has_gradient, is_view, storages_of, storages_of_all
from mst_fx.recognise.effects import DETACHED, handed, leaves, lies_behind, sends_back, used_by, writes_data
from mst_fx.recognise.reader import Reader

if TYPE_CHECKING:
    from mst_fx.recognise.discover import Nested
    from mst_fx.recognise.region import Region

Overwritten: TypeAlias = Mapping[torch.UntypedStorage, Node]
"""Memory of captured values, and a node that writes to it."""


def forbid_writes_between(
    reader: Reader, nodes: Sequence[Node], live_ins: Collection[Node], before: Node, returned: Collection[Node]
) -> None:
    """Raise a refusal for a write that would have another effect once the region runs in one place.

    Nothing may change what the region reads between that place and its own nodes. The region may not change what
    others read: its live-ins, or a value of its own that is read outside before the write. Others may write to its
    values after its last read: they write to the loop's results then.

    Args:
        reader: reads the graph.
        nodes: the region, in graph order.
        live_ins: what it reads, and what the nodes that move ahead make and read.
        before: the node that the loop goes in front of.
        returned: large values that the caller of the graph gets.

    Raises:
        Refusal: as above (MUTATION).
    """
    inside, order = set(nodes), reader.order
    node, end = min(before, nodes[0], key=order.__getitem__), max(order[before], order[nodes[-1]])
    if not any(order[node] <= order[writer] <= end for writer in reader.memory_written):
        return  # as nearly always
    foreign = storages_of_all(live_ins)
    own = storages_of_all(inside) - foreign
    returned_memory = storages_of_all(returned)
    read, seen, changed = (set[torch.UntypedStorage]() for _ in range(3))
    while order.get(node, end + 1) <= end:
        operands = storages_of_all(node.all_input_nodes)
        written = reader.memory_written_by(node)
        if node in inside:
            wrong = written & (foreign | seen) or operands & changed
            read |= operands
        else:
            wrong = written & (foreign if order[node] >= order[before] else foreign & read) or written & returned_memory
            changed |= written & own
            seen |= operands & own if reader.written_by(node) else operands & own - storages_of(node)
        if wrong:
            does = "writes to its operand" if written else "reads what has been written to outside of the region"
            raise Refusal(Reason.MUTATION, node, f"{op_name(node)} {does}")
        node = node.next


def forbid_writes_to_shared(reader: Reader, nodes: Sequence[Node], outputs: Sequence[Node]) -> None:
    """Raise a refusal for a write to memory that two outputs share: each result of a loop has memory of its own.

    Where the graph's caller gets both, the caller may write.

    Args:
        reader: reads the graph.
        nodes: the region, in graph order.
        outputs: those of its nodes that others read.

    Raises:
        Refusal: as above (MUTATION).
    """
    inside = set(nodes)
    each = [storages_of(node) for node in outputs]
    shared = {memory for number, some in enumerate(each) for other in each[:number] for memory in some & other}
    for number, node in enumerate(outputs):
        beside = storages_of_all(other for other in outputs[:number] if leaves(other))
        if leaves(node) and not beside.isdisjoint(storages_of(node)):
            text = f"{op_name(node)} gives a view that leaves the graph beside what it views"
            raise Refusal(Reason.MUTATION, node, text)
    for node in reader.owner.graph.nodes if shared else ():
        written = reader.memory_written_by(node)
        if node not in inside and reader.order[node] > reader.order[nodes[0]] and not shared.isdisjoint(written):
            raise Refusal(Reason.MUTATION, node, f"{op_name(node)} writes to memory that two results share")


def forbid_late_writes(reader: Reader, region: Region, around: Overwritten, *, recomputes: bool) -> None:
    """Raise a refusal for a write after the region to memory that its backward reads.

    Args:
        reader: reads the graph.
        region: a region with gradients.
        around: what the graphs around this one write to after it has run.
        recomputes: whether the backward reads all live-ins again. Otherwise only writes through `.data` matter: eager
            execution, which may have saved the value, computes gradients with the new one.

    Raises:
        Refusal: as above (MUTATION).
    """
    end = max(reader.order[region.before], reader.order[region.last])
    later = {**around, **written_behind(reader, end)}
    read = storages_of_all(region.live_ins)
    for memory, node in later.items():
        if memory in read and (recomputes or writes_data(node)):
            text = f"{op_name(node)} writes to what the backward of the region at {region.name} reads again"
            raise Refusal(Reason.MUTATION, node, text)


def written_behind(reader: Reader, position: int) -> Overwritten:
    """Return the memory that nodes after a position of the graph's order write to, and the last such node of each."""
    written = reader.memory_written.items()
    return {each: node for node, memory in written if reader.order[node] > position for each in memory}


def written_when_run(reader: Reader, child: Nested, around: Overwritten) -> Overwritten:
    """Return `around` of `forbid_late_writes` for a subgraph: memory of its placeholders that is written to later.

    A subgraph that runs again in the backward writes again, too.

    Args:
        reader: reads the graph that runs the subgraph.
        child: the subgraph.
        around: the same for that graph.
    """
    found: dict[torch.UntypedStorage, Node] = {}
    for caller in child.callers:
        later = {**around, **written_behind(reader, reader.order[caller] - child.repeated)}
        for given, operand in handed(caller, child.module) if later else ():
            for node in (later[memory] for memory in later if memory in storages_of(operand)):
                found.update(dict.fromkeys(storages_of(given), node))
    return found


def forbid_gradients_behind_detach(reader: Reader, nodes: Sequence[Node]) -> None:
    """Raise a refusal for a write that gives a detached view a gradient of its own, which its base does not have."""
    for node in nodes:
        for target in reader.written_by(node) if reader.modes[node].grad else ():
            others = (operand for operand in node.all_input_nodes if operand is not target)
            if lies_behind(target, DETACHED) and any(map(has_gradient, others)):
                text = f"{op_name(node)} writes what has a gradient to a detached view"
                raise Refusal(Reason.MUTATION, node, text)


def forbid_later_changes(reader: Reader, nodes: Sequence[Node], live_ins: Collection[Node]) -> None:
    """Raise a refusal for a value that gets another shape in place after the region, or loses or gets its gradient.

    A captured value tells what it is in the end, not what it was when it was read. So no value of the region and no
    live-in may change after it; nor may gradients of what is made of the region.
    """
    for node in (*reader.switches_gradients, *reader.reshapes_in_place):
        changed = set(node.all_input_nodes[:1])
        made = ancestors(changed) if node in reader.switches_gradients else changed
        if reader.order[node] > reader.order[nodes[0]] and (
            not made.isdisjoint(nodes) or not changed.isdisjoint(live_ins)
        ):
            text = f"{op_name(node)} changes in place a value that the region makes or has read"
            raise Refusal(Reason.MUTATION, node, text)


def forbid_rebinding(reader: Reader, nodes: Sequence[Node], moved: Collection[Node]) -> None:
    """Raise a refusal for a value that gets other memory (`x.data = y`) once the region has read it.

    Args:
        reader: reads the graph.
        nodes: the region, in graph order.
        moved: what the nodes that move in front of it make and read.

    Raises:
        Refusal: as above (MUTATION).
    """
    read = set(moved).union(*map(used_by, nodes))
    for node in reader.rebinding:
        if reader.order[node] > reader.order[nodes[0]] and not read.isdisjoint(node.all_input_nodes[:1]):
            text = f"{op_name(node)} gives other memory to a value that the region has read"
            raise Refusal(Reason.MUTATION, node, text)


def forbid_writes_to_saved(reader: Reader, nodes: Sequence[Node]) -> None:
    """Raise a refusal for a write through `.data` to what an earlier op may have saved: its backward reads the new one.

    Neither may the region write so to what any op has saved, nor may others to what the region's ops have saved. After
    any other write that autograd does not see, eager execution reports that the saved value has changed.
    """
    inside = set(nodes)
    given = storages_of_all(operand for node in nodes for operand in node.all_input_nodes if operand not in inside)
    for write in reader.data_writes:
        memory = reader.memory_written_by(write) - (set() if write in inside else given)
        for node in reader.owner.graph.nodes if write in inside else nodes:
            if reader.order[node] < reader.order[write] and _may_have_saved(reader, node, memory):
                text = f"{op_name(write)} writes through .data to what {op_name(node)} may have saved for backward"
                raise Refusal(Reason.MUTATION, write, text)


def _may_have_saved(reader: Reader, node: Node, memory: Collection[torch.UntypedStorage]) -> bool:
    """Return whether the backward of a node may read memory: its operands, or its value unless a product made it."""
    if not (reader.modes[node].grad and sends_back(node)):
        return False
    reads = any(not storages_of(operand).isdisjoint(memory) for operand in node.all_input_nodes)
    makes = not storages_of(node).isdisjoint(memory)
    if reader.written_by(node):
        return reads
    ops = reader.ops(node)
    return (reads and not makes) or (makes and not is_view(node) and (ops is None or not ops <= BILINEAR))
