"""A node on DTensors is traced on fakes, forward and backward: does it do the same on each rank's shard, by itself?

It does where the ops that the DTensors run on their shards are those that the node runs on plain shards. A collective,
a reduction that counts the elements of all ranks, and a size that is that of the whole differ. There is no list of ops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map_only

from mst_fx.capture.fingerprint import like, likeness_of_node
from mst_fx.capture.lower import tracing, under
from mst_fx.capture.run_node import execute
from mst_fx.core.graph_modules import operands_read
from mst_fx.core.modes import Mode
from mst_fx.core.torch_private.collectives import is_collective
from mst_fx.core.values import fake_value, is_sharded, plain_tensors, tensors_of
from mst_fx.ops.shards import leave
from mst_fx.recognise.dtensors import (
    Placements,
    Watch,
    gradient_of,
    is_even,
    placements_of,
    ranks_of,
    same_sizes,
)
from mst_fx.recognise.effects import writes

aten = torch.ops.aten


@dataclass(frozen=True)
class OnShards:
    """What a node does on the shards of one rank.

    Attributes:
        moves: it computes nothing: the shard of its value is that of its operand.
        grads: for each operand that is a DTensor, in the order of `all_input_nodes`, the placements of its gradient.
        shares: for each of them, 1, or the number of ranks among which a value that all hold is divided.
        ranks: the number of ranks that the value of the node lies on, each with a part of its own.
        why_whole: why it does something else on shards than on the whole, "" where it does the same. It still is a
            function of the shards: it runs on DTensors that are made of them.
    """

    moves: bool
    grads: tuple[Placements, ...]
    shares: tuple[int, ...]
    ranks: int
    why_whole: str = ""


def on_shards(owner: GraphModule, node: Node, mode: Mode) -> OnShards | str:
    """Return what a node on DTensors does on shards, or why it has to stay on DTensors.

    Args:
        owner: the module that holds the graph.
        node: it reads or makes DTensors.
        mode: the mode that it runs in.
    """
    why = _strange(node)
    if why:
        return why
    try:
        return _Trial(owner, node, mode).outcome()
    except Exception as error:  # an op may do anything
        return f"cannot be traced on DTensors ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def likeness_on_shards(node: Node, mode: Mode) -> Hashable:
    """Return a key that is equal for nodes that do the same on DTensors of the same placements."""
    near = [x for each in (node, *node.all_input_nodes) for x in tensors_of(each)]
    facts = [(x.requires_grad, placements_of(x), like(plain_tensors(x)[0])) for x in near if is_sharded(x)]
    return likeness_of_node(node), tuple(facts), mode


def _strange(node: Node) -> str:
    """Return why a node is not even tried: its values are none that a trial may make."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if node.op not in ("call_function", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
        return "holds a graph or a module"
    if not isinstance(fake_value(node), torch.Tensor):
        return "gives several values" if tensors_of(node) else "gives no tensor"
    if writes(node):
        return "writes in place"
    near: list[Any] = [x for each in (node, *node.all_input_nodes) for x in tensors_of(each) if is_sharded(x)]
    for value in near:
        kinds = {type(each) for each in value.placements} - {Shard, Replicate, Partial}
        if kinds:  # a mask that such a placement holds would stay in torch's cache, as a fake tensor
            return f"has values placed as {kinds.pop().__name__}"
        if any(each.is_partial() and each.reduce_op != "sum" for each in value.placements):
            return "has values to be reduced by other means than a sum"
        if not is_even(value):
            return "has shards of unlike sizes"
    return ""


@dataclass(frozen=True)
class _Run:
    """One run of a node, forward and backward: its value, gradients of its operands, and the ops on shards.

    Attributes:
        draws: whether one of them draws random numbers.
    """

    value: Any
    grads: Mapping[Node, Any]
    ops: Counter[Hashable]
    seen: tuple[Any, ...]
    draws: bool


@dataclass(frozen=True, eq=False)
class _Trial:
    owner: GraphModule
    node: Node
    mode: Mode

    def outcome(self) -> OnShards | str:
        """Run the node on DTensors and on shards, and compare."""
        value = fake_value(self.node)
        operands = operands_read(self.node)
        sharded = [operand for operand in operands if is_sharded(fake_value(operand))]
        plain = [x for operand in operands if operand not in sharded for x in tensors_of(operand)]
        leaves = [x for near in (self.node, *operands) for each in tensors_of(near) for x in plain_tensors(each)]
        with tracing(leaves), torch.enable_grad() if self.mode.grad else nullcontext():
            given = {operand: tree_map_only(torch.Tensor, _leaf, fake_value(operand)) for operand in operands}
            whole = self._run(given)
            why = self._differs(whole)
            if why:
                return self._communicates(whole) or why
            grads = tuple(self._gradient(whole, operand) for operand in sharded)
            ranks = ranks_of(value) if is_sharded(value) else 1
            why = self._communicates(whole)
            if not why and self._moves(whole, given):
                return OnShards(True, grads, (1,) * len(sharded), ranks)
            if not sharded:
                return why or "gives a plain value"
            why = why or self._why_whole(whole, plain)
            for shares in self._shares(sharded) if not why else ():
                if self._is_same(whole, given, dict(zip(sharded, shares, strict=True))):
                    return OnShards(False, grads, shares, ranks)
        why = why or "does on shards something else than on the whole"
        by_default = tuple(gradient_of(placements_of(fake_value(operand))) for operand in sharded)
        return OnShards(False, grads, (1,) * len(sharded), ranks, why) if grads == by_default else why

    def _why_whole(self, run: _Run, plain: Sequence[torch.Tensor]) -> str:
        """Return why a node cannot run on shards alone, whatever it computes."""
        if not is_sharded(run.value):
            return "gives a plain value"
        return "reads a plain tensor as well" if any(x.dim() or x.requires_grad for x in plain) else ""

    def _run(self, given: Mapping[Node, Any]) -> _Run:
        wanted = {node: x for node, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        grads: Sequence[Any] = ()
        watch = Watch(given.values())
        with watch, under(self.mode.autocast):
            value = execute(self.owner, self.node, given)
        if value.requires_grad and wanted:
            upstream = _upstream(value)
            watch.follow([upstream])
            with watch:
                grads = torch.autograd.grad([value], list(wanted.values()), [upstream], allow_unused=True)
        return _Run(value, dict(zip(wanted, grads, strict=False)), Counter(watch.keys), tuple(watch.seen), watch.draws)

    def _differs(self, run: _Run) -> str:
        """Return why a run on DTensors cannot be one of shards, whatever is done with them."""
        if run.draws:
            return "draws random numbers"
        captured = fake_value(self.node)
        if is_sharded(captured) != is_sharded(run.value) or not same_sizes(captured, run.value):
            return "makes another value than was captured"
        if is_sharded(captured) and placements_of(captured) != placements_of(run.value):
            return "places its value otherwise than was captured"
        return ""

    def _communicates(self, run: _Run) -> str:
        names = (op._schema.name.partition("::")[2] for op in run.seen if is_collective(op))
        return next((f"communicates ({name})" for name in names), "")

    def _moves(self, run: _Run, given: Mapping[Node, Any]) -> bool:
        """Return whether a run gave the shard of its one operand as it was, and passed the gradient back as it is."""
        values = [value for value in given.values() if isinstance(value, torch.Tensor)]
        if run.ops or len(values) != 1 or values[0].requires_grad != run.value.requires_grad:
            return False
        before, after = plain_tensors(values[0])[0], plain_tensors(run.value)[0]
        return before.untyped_storage() == after.untyped_storage() and same_sizes(before, after)

    def _gradient(self, run: _Run, operand: Node) -> Placements:
        grad, value = run.grads.get(operand), fake_value(operand)
        return gradient_of(placements_of(value)) if grad is None else placements_of(grad)

    def _shares(self, sharded: Sequence[Node]) -> list[tuple[int, ...]]:
        """Return what to try: all operands as they are; those that all ranks hold, as shares of the sum."""
        value = fake_value(self.node)
        sizes = value.device_mesh.shape if any(each.is_partial() for each in value.placements) else ()
        found = [1] * len(sharded)
        for position, operand in enumerate(sharded):
            given = fake_value(operand).placements
            if all(each.is_replicate() for each in given):
                pairs = zip(value.placements, sizes, strict=False)
                found[position] = prod(size for each, size in pairs if each.is_partial())
        return list(dict.fromkeys([(1,) * len(sharded), tuple(found)]))

    def _is_same(self, whole: _Run, given: Mapping[Node, Any], shares: Mapping[Node, int]) -> bool:
        shards = {node: _shard(value) for node, value in given.items()}
        try:
            run = self._run(shards)
        except Exception:  # a size of the whole does not fit, or a method of DTensors is none of shards
            return False
        divided = {shards[node]: share for node, share in shares.items() if share != 1}
        divisions = Counter(_division(shard, share) for shard, share in divided.items())
        more = Counter(_without_dtype(key) for key in (whole.ops - run.ops).elements())
        if run.ops - whole.ops or more != divisions or not same_sizes(plain_tensors(whole.value)[0], run.value):
            return False
        return all((grad is None) == (whole.grads.get(node) is None) for node, grad in run.grads.items())


def _division(shard: torch.Tensor, share: int) -> Hashable:
    return aten.div.Tensor, like(shard)[0], like(share)


def _without_dtype(key: Any) -> Hashable:
    """Return the key of a division without the dtype, any other as it is: under autocast, the cast may come first."""
    op, args, _ = key
    return (op, args[0][0], args[1]) if op == aten.div.Tensor else key


def _leaf(value: torch.Tensor) -> torch.Tensor:
    """Return an alias without a history."""
    return value.detach().requires_grad_(value.requires_grad)


def _shard(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    own = plain_tensors(value)[0].detach() if is_sharded(value) else value
    return own.requires_grad_(value.requires_grad)


def _upstream(value: Any) -> torch.Tensor:
    """Return a gradient for a value, placed as it is by default."""
    with torch.no_grad():
        if not is_sharded(value):
            return torch.empty_like(value)
        return leave(torch.empty_like(plain_tensors(value)[0]), value, gradient_of(placements_of(value)))
