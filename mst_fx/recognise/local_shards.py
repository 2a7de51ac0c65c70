"""Ops on DTensors that need no communication become the same ops on the shards of this rank; loops take plain tensors.

    y = linear(x, w)    becomes    y = leave(linear(enter(x), enter(w)))

`enter` and `leave` stand at the borders alone: between two such ops there is the shard. What communicates stays as it
is, and outside of a loop. A gradient that comes back to a DTensor is placed as torch itself would place it there; a
value whose readers give gradients of unlike placements is entered once for each of these.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg
from torch.utils._pytree import tree_flatten

from mst_fx.capture.lower import tracing, under
from mst_fx.capture.run_node import execute
from mst_fx.core.modes import Mode, modes_of
from mst_fx.core.values import fake_value, is_sharded, plain_tensors, storages_of_all, tensors_of
from mst_fx.ops.shards import OnDTensors, enter, leave
from mst_fx.recognise.contractions import RANKS
from mst_fx.recognise.decomposed_nodes import STAYS
from mst_fx.recognise.dtensors import Placements, gradient_of, placements_of, ranks_of, same_sizes
from mst_fx.recognise.effects import written_by
from mst_fx.recognise.on_shards import OnShards, likeness_on_shards, on_shards
from mst_fx.recognise.rebuild import LOCAL, rebuilt

ON_SHARDS = "on shards"
"""All changes of this kind."""
ORIGIN = ("stack_trace", "nn_module_stack")


def has_shards(gm: GraphModule) -> bool:
    """Return whether a graph has DTensors."""
    return any(is_sharded(value) for node in gm.graph.nodes for value in tensors_of(node))


def localised(
    gm: GraphModule, owner: Hashable, outer: Mode, left_alone: Collection[Hashable], known: dict[Hashable, Any]
) -> GraphModule | None:
    """Return a copy of a graph with ops on shards in place of ops on DTensors; None for a graph without DTensors.

    Nodes of the copy hold in their meta of which change they are (LOCAL), why they have to stay on DTensors (STAYS),
    and on how many ranks the parts of their value lie (RANKS).

    Args:
        gm: the graph.
        owner: with the name of a node, it tells a change from all others.
        outer: the mode that the graph runs in.
        left_alone: changes that are not to be made.
        known: what nodes do on shards, by their likeness; it is added to.
    """
    if not has_shards(gm):
        return None
    copy = rebuilt(gm, [])
    change = _Change(copy, modes_of(copy.graph, outer), known)
    change.make(left_alone, owner)
    _spread_ranks(copy)
    copy.graph.lint()
    copy.recompile()
    return copy


@dataclass(eq=False)
class _Change:
    """One change of a graph, in place.

    Attributes:
        owner: the module that holds the graph.
        modes: the mode at each node.
        known: as for `localised`.
        facts: what each node that may run on shards does there.
        shard: the node that gives the shard of a DTensor, by the node of the DTensor.
        entered: the nodes that give shards of DTensors from outside.
    """

    owner: GraphModule
    modes: Mapping[Node, Mode]
    known: dict[Hashable, Any]
    facts: dict[Node, OnShards] = field(default_factory=dict)
    shard: dict[Node, Node] = field(default_factory=dict)
    entered: dict[Hashable, Node] = field(default_factory=dict)

    def make(self, left_alone: Collection[Hashable], owner: Hashable) -> None:
        """Run on shards what can run there, but for the parts that are to be left alone."""
        nodes = self.owner.graph.nodes
        written = storages_of_all(target for node in nodes for target in written_by(node))
        for node in nodes:
            if node.op.startswith("call_") and _near_shards(node):
                is_written = not written.isdisjoint(storages_of_all((node, *node.all_input_nodes)))
                fact = "shares memory that is written to" if is_written else self._fact(node)
                node.meta[STAYS] = fact.why_whole if isinstance(fact, OnShards) else fact
                if isinstance(fact, OnShards):
                    self.facts[node] = fact
        part_of = self._parts()
        keys: dict[Node, Hashable] = {node: (owner, ON_SHARDS, part.name) for node, part in part_of.items()}
        keys |= {node: (owner, ON_SHARDS, "whole", node.name) for node, fact in self.facts.items() if fact.why_whole}
        chosen = [node for node in self.facts if node in keys and keys[node] not in left_alone]
        for node in chosen:
            self._localise(node, frozenset([keys[node]]))
        self._put_back()

    def _fact(self, node: Node) -> OnShards | str:
        key = likeness_on_shards(node, self.modes[node])
        if key not in self.known:
            self.known[key] = on_shards(self.owner, node, self.modes[node])
        fact: OnShards | str = self.known[key]
        return fact

    def _parts(self) -> dict[Node, Node]:
        """Return for each node the first of those that it shares shards with, where one of them computes something.

        An op that runs on DTensors, made of shards, is a part of its own; what moves shards to it or from it counts.
        """
        part: dict[Node, Node] = {}
        worth = set[Node]()

        def first(node: Node) -> Node:
            while part[node] is not node:
                node = part[node]
            return node

        for node, fact in self.facts.items():
            part[node] = node
            for operand, grad in zip(_sharded_operands(node), fact.grads, strict=True):
                if operand in part and grad == _own_gradient(operand):
                    if fact.why_whole or self.facts[operand].why_whole:
                        worth |= {operand, node}
                    else:
                        older, newer = sorted([first(operand), first(node)])
                        part[newer] = older
        worth = {first(node) for node in part if node in worth or not self.facts[node].moves}
        return {node: first(node) for node in part if first(node) in worth}

    def _localise(self, node: Node, keys: frozenset[Hashable]) -> None:
        fact = self.facts[node]
        operands = _sharded_operands(node)
        if fact.moves and not operands:
            self.shard[node] = next(operand for operand in node.all_input_nodes if tensors_of(operand))
        elif fact.moves:
            (operand,) = operands
            direct = operand in self.shard and fact.grads[0] == _own_gradient(operand)
            if direct and is_sharded(fake_value(node)):
                self.shard[node] = self.shard[operand]
            elif direct:
                node.replace_all_uses_with(self.shard[operand])
                self.owner.graph.erase_node(node)
        elif is_sharded(fake_value(node)):
            self.shard[node] = self._computed(node, fact, keys)
        else:
            node.replace_all_uses_with(self._computed(node, fact, keys))
            self.owner.graph.erase_node(node)

    def _computed(self, node: Node, fact: OnShards, keys: frozenset[Hashable]) -> Node:
        """Add the node that computes the shard of a DTensor."""
        graph, of = self.owner.graph, dict[Node, Node]()
        with graph.inserting_before(node):
            for operand, grads, share in zip(_sharded_operands(node), fact.grads, fact.shares, strict=True):
                direct = operand in self.shard and grads == _own_gradient(operand) and share == 1
                of[operand] = self.shard[operand] if direct else self._entered(operand, node, grads, share)
            args, kwargs = map_arg((node.args, node.kwargs), lambda operand: of.get(operand, operand))
            if fact.why_whole:
                new = graph.create_node("call_function", _on_dtensors(node), args, kwargs)
            else:
                new = graph.create_node(node.op, node.target, args, kwargs)
        new.meta = dict(node.meta)
        self._give_value(new, self.modes[node], {RANKS: fact.ranks, LOCAL: keys})
        return new

    def _entered(self, operand: Node, reader: Node, grads: Placements, share: int) -> Node:
        key = (operand, grads, share, self.modes[reader])
        if key not in self.entered:
            arguments = (operand, grads) if share == 1 else (operand, grads, share)
            node = self.owner.graph.call_function(enter, arguments)
            node.meta = {key: reader.meta[key] for key in ORIGIN if key in reader.meta}
            self._give_value(node, self.modes[reader], {RANKS: ranks_of(fake_value(operand))})
            self.entered[key] = node
        return self.entered[key]

    def _give_value(self, node: Node, mode: Mode, more: Mapping[str, Any]) -> None:
        """Run a new node on the values of its operands, and leave its value on it."""
        env = {operand: fake_value(operand) for operand in node.all_input_nodes}
        leaves = [plain for operand in env for x in tensors_of(operand) for plain in plain_tensors(x)]
        with tracing(leaves), torch.set_grad_enabled(mode.grad), under(mode.autocast):
            node.meta.update(more, example_value=execute(self.owner, node, env))

    def _put_back(self) -> None:
        """Make DTensors of shards for the readers that stay on DTensors, and erase the nodes that nobody reads."""
        graph, computes = self.owner.graph, {node for node in self.shard if not self.facts[node].moves}
        for node in [node for node in self.shard if node in computes or _sharded_operands(node)]:
            readers = [user for user in node.users if user not in self.shard]
            if readers:
                with graph.inserting_after(self.shard[node] if node in computes else node):
                    whole = graph.call_function(leave, (self.shard[node], self._like(node), _placements(node)))
                whole.meta = {key: value for key, value in node.meta.items() if key in (*ORIGIN, "example_value")}
                for reader in readers:
                    reader.replace_input_with(node, whole)
        for node in reversed(self.shard):
            if not node.users:
                graph.erase_node(node)

    def _like(self, node: Node) -> Node:
        """Return a DTensor on the same mesh that exists in any case: one that comes from outside."""
        while node in self.shard and (operands := _sharded_operands(node)):
            node = next((operand for operand in operands if operand not in self.shard), operands[0])
        return node


def _near_shards(node: Node) -> bool:
    return any(is_sharded(value) for near in (node, *node.all_input_nodes) for value in tensors_of(near))


def _sharded_operands(node: Node) -> list[Node]:
    return [operand for operand in node.all_input_nodes if is_sharded(fake_value(operand))]


def _on_dtensors(node: Node) -> OnDTensors:
    """Return a node's op as a function of the shards of its operands."""
    leaves, _ = tree_flatten((node.args, node.kwargs))
    pairs = enumerate(leaves)
    sharded = [(at, fake_value(x)) for at, x in pairs if isinstance(x, Node) and is_sharded(fake_value(x))]
    operands = tuple((position, placements_of(value)) for position, value in sharded)
    grads = _own_gradient(node) if is_sharded(fake_value(node)) else None
    return OnDTensors(node.target, sharded[0][1].device_mesh, operands, grads)


def _placements(node: Node) -> Placements:
    return placements_of(fake_value(node))


def _own_gradient(node: Node) -> Placements:
    """Return the placements of the gradient that an op on the shards of a value expects from its readers."""
    return gradient_of(_placements(node))


def _spread_ranks(gm: GraphModule) -> None:
    """Tell of plain values, too, on how many ranks their parts lie: those that are made of shards.

    A value that is made of several shards, and is of another shape than each, is a sum over what differs by rank.
    """
    for node in gm.graph.nodes:
        value, operands = fake_value(node), node.all_input_nodes
        if RANKS in node.meta or not node.op.startswith("call_") or not isinstance(value, torch.Tensor):
            continue
        if is_sharded(value) or value.dim() == 0:
            continue
        if sharded := _sharded_operands(node):
            node.meta[RANKS] = max(ranks_of(fake_value(operand)) for operand in sharded)
            continue
        parts = [operand for operand in operands if operand.meta.get(RANKS, 1) > 1 and tensors_of(operand)]
        if len(parts) == 1 or any(same_sizes(value, tensors_of(operand)[0]) for operand in parts):
            node.meta[RANKS] = max(operand.meta[RANKS] for operand in parts)
