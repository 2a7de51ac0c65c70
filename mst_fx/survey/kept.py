"""What checkpointed blocks keep for backward: what they read, and what loops in place of checkpoints read.

These are the values that the option `offload` sends to the host. The partitioner (`runtime.offload_partition`) finds
them anew in the joint graph; here they are found in the captured one, for the planner and for the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from mst_fx.core.module_paths import common_path, module_path
from mst_fx.core.provenance import source_line
from mst_fx.core.sizes import hint, long_hint
from mst_fx.core.values import bytes_of, fake_value
from mst_fx.recognise.checkpoints import is_opened
from mst_fx.recognise.reader import Reader
from mst_fx.report.items import Offloaded
from mst_fx.survey.surveyed import Site, Surveyed


@dataclass(frozen=True)
class Kept:
    """What one block keeps.

    Attributes:
        block: the node that runs the checkpoint, or the first of a region whose loop stands in its place.
        values: the values, those large enough to be sent.
        small: bytes of the others.
        module: path of the block.
    """

    block: Node
    values: tuple[Node, ...]
    small: int
    module: str

    @property
    def bytes(self) -> int:
        """Bytes of the values at the captured sizes."""
        return sum(bytes_of(fake_value(node)) for node in self.values)

    def entries(self) -> Iterator[Offloaded]:
        """Yield the entries of a report."""
        for node in self.values:
            source = source_line(node) or source_line(self.block)
            yield Offloaded(self.module, source, bytes_of(fake_value(node)))


def kept_by_blocks(surveyed: Surveyed, least: int) -> list[Kept]:
    """Return what the blocks of a graph keep, in the order of the forward; a value that several read is the last one's.

    Args:
        surveyed: the graph.
        least: bytes; smaller values are not sent.
    """
    return list(_kept(surveyed, least)) if not surveyed.around.repeated else []


def _kept(surveyed: Surveyed, least: int) -> Iterator[Kept]:
    reader = surveyed.reader
    read = {**_checkpoints(surveyed), **_loops(surveyed)}
    taken = {reader.unviewed(node) for node in reader.owner.graph.output_node().all_input_nodes}
    of_block: dict[Node, list[Node]] = {}
    for block in sorted(read, key=reader.order.__getitem__, reverse=True):
        mine = {reader.unviewed(node): node for node in read[block][1] if _may_leave(reader, node)}
        of_block[block] = [node for base, node in mine.items() if base not in taken]
        taken.update(mine)
    inner = {caller: child for child, callers in surveyed.children.values() for caller in callers}
    for node in reader.owner.graph.nodes:
        if node in of_block:
            large = tuple(value for value in of_block[node] if bytes_of(fake_value(value), long_hint) >= least)
            small = sum(bytes_of(fake_value(value), hint) for value in of_block[node] if value not in large)
            yield Kept(node, large, small, read[node][0])
        elif node in inner:
            yield from _kept(inner[node], least)


def _checkpoints(surveyed: Surveyed) -> dict[Node, tuple[str, list[Node]]]:
    """Return the module and the operands of each checkpoint, by the node that runs it."""
    found = {}
    for child, callers in surveyed.children.values():
        paths = {path for node in child.reader.owner.graph.nodes if (path := module_path(node))}
        if child.around.repeated:
            found.update({caller: (common_path(paths), caller.all_input_nodes) for caller in callers})
    return found


def _loops(surveyed: Surveyed) -> dict[Node, tuple[str, list[Node]]]:
    """Return the module and the tokens of each region whose loop stands in place of a checkpoint."""
    sites = [site for site in surveyed.sites if stands_for_checkpoint(site)]
    return {site.region.nodes[0]: (site.region.module, [site.region.stream]) for site in sites}


def stands_for_checkpoint(site: Site) -> bool:
    """Return whether the loop of a region keeps what a checkpoint would, and recomputes from it."""
    return is_opened(site.region) and site.work.backward == "recompute"


def _may_leave(reader: Reader, node: Node) -> bool:
    """Return whether a value is an activation that gradients pass through."""
    value = fake_value(node)
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() and value.requires_grad):
        return False
    return not isinstance(value, torch.nn.Parameter) and not reader.is_learnt(node)
