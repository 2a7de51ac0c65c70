"""A node on DTensors is traced on fakes, forward and backward: does it do the same on each rank's shard, by itself?

It does where the ops that the DTensors run on their shards are those that the node runs on plain shards. A collective,
a reduction that counts the elements of all ranks, and a size that is that of the whole differ; no list of ops is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from mst_fx.capture.fingerprint import like, likeness_of_node
from mst_fx.capture.lower import tracing, under
from mst_fx.capture.run_node import execute
from mst_fx.core.aten_ops import ALIASES, is_random
from mst_fx.core.graph_modules import operands_read
from mst_fx.core.modes import Mode
from mst_fx.core.sizes import hint, sure
from mst_fx.core.torch_private.tracing import TorchDispatchMode
from mst_fx.core.values import fake_value, is_sharded, plain_tensors, tensors_of
from mst_fx.ops.shards import leave
from mst_fx.recognise.effects import writes

aten = torch.ops.aten

Placements: TypeAlias = tuple[Any, ...]
COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "_dtensor", "symm_mem")
"""Namespaces of ops that communicate."""


@dataclass(frozen=True)
class OnShards:
    """What a node does on the shards of one rank.

    Attributes:
        moves: it computes nothing: the shard of its value is that of its operand.
        grads: for each operand that is a DTensor, in the order of `all_input_nodes`, the placements of its gradient.
        shares: for each of them, 1, or the number of ranks among which a value that all hold is divided.
        ranks: the number of ranks that the value of the node lies on, each with a part of its own.
    """

    moves: bool
    grads: tuple[Placements, ...]
    shares: tuple[int, ...]
    ranks: int


def placements_of(value: Any) -> Placements:
    """Return the placements of a DTensor, with dims that count from the front."""
    return tuple(_from_the_front(each, value.dim()) for each in value.placements)


def gradient_of(placements: Placements) -> Placements:
    """Return the placements that the gradient of a DTensor has by default: whole where the value is a sum to be."""
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if each.is_partial() else each for each in placements)


def ranks_of(value: Any) -> int:
    """Return the number of ranks that hold parts of a DTensor, each a part of its own."""
    shard = plain_tensors(value)[0]
    return max(1, prod(map(hint, value.shape)) // max(1, prod(map(hint, shard.shape))))


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
    for value in (x for each in (node, *node.all_input_nodes) for x in tensors_of(each) if is_sharded(x)):
        kinds = {type(each) for each in value.placements} - {Shard, Replicate, Partial}
        if kinds:  # a mask that such a placement holds would stay in torch's cache, as a fake tensor
            return f"has values placed as {kinds.pop().__name__}"
        if any(each.is_partial() and each.reduce_op != "sum" for each in value.placements):
            return "has values to be reduced by other means than a sum"
        if not _is_even(value):
            return "has shards of unlike sizes"
    return ""


@dataclass(frozen=True)
class _Run:
    """One run of a node, forward and backward: its value, gradients of its operands, and the ops on shards."""

    value: Any
    grads: Mapping[Node, Any]
    ops: Counter[Hashable]
    seen: tuple[Any, ...]


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
                return why
            grads = tuple(self._gradient(whole, operand) for operand in sharded)
            if self._moves(whole, given):
                return OnShards(True, grads, (1,) * len(sharded), ranks_of(value) if is_sharded(value) else 1)
            if not is_sharded(value) or not sharded:
                return "gives a plain value"
            if any(x.dim() or x.requires_grad for x in plain):
                return "reads a plain tensor as well"
            for shares in self._shares(sharded):
                if self._is_same(whole, given, dict(zip(sharded, shares, strict=True))):
                    return OnShards(False, grads, shares, ranks_of(value))
        return "does on shards something else than on the whole"

    def _run(self, given: Mapping[Node, Any]) -> _Run:
        wanted = {node: x for node, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        grads: Sequence[Any] = ()
        watch = _Watch(given.values())
        with watch, under(self.mode.autocast):
            value = execute(self.owner, self.node, given)
        if value.requires_grad and wanted:
            upstream = _upstream(value)
            watch.follow([upstream])
            with watch:
                grads = torch.autograd.grad([value], list(wanted.values()), [upstream], allow_unused=True)
        return _Run(value, dict(zip(wanted, grads, strict=False)), Counter(watch.keys), tuple(watch.seen))

    def _differs(self, run: _Run) -> str:
        """Return why a run on DTensors cannot be one on shards, whatever that does."""
        met = dict.fromkeys(run.seen)
        names = [op._schema.name.partition("::") for op in met]
        for namespace, _, name in names:
            if namespace in COLLECTIVES:
                return f"communicates ({name})"
        if any(map(is_random, met)):
            return "draws random numbers"
        captured = fake_value(self.node)
        if is_sharded(captured) != is_sharded(run.value) or not same_sizes(captured, run.value):
            return "makes another value than was captured"
        if is_sharded(captured) and placements_of(captured) != placements_of(run.value):
            return "places its value otherwise than was captured"
        return ""

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


def _is_even(value: Any) -> bool:
    """Return whether all ranks hold shards of the same size."""
    sizes = list(plain_tensors(value)[0].shape)
    for placement, ranks in zip(placements_of(value), value.device_mesh.shape, strict=True):
        if placement.is_shard():
            sizes[placement.dim] *= ranks
    return all(sure(size == whole) for size, whole in zip(sizes, value.shape, strict=True))


def _division(shard: torch.Tensor, share: int) -> Hashable:
    return aten.div.Tensor, like(tuple(shard.shape)), like(share)


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


def _upstream(value: torch.Tensor) -> torch.Tensor:
    """Return a gradient for a value, placed as it is by default."""
    with torch.no_grad():
        if not is_sharded(value):
            return torch.empty_like(value)
        return leave(torch.empty_like(plain_tensors(value)[0]), value, gradient_of(placements_of(value)))


def same_sizes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, and the same sizes whatever varies."""
    pairs = list(zip(one.shape, other.shape, strict=False))
    return one.dim() == other.dim() and one.dtype == other.dtype and all(sure(a == b) for a, b in pairs)


def _from_the_front(placement: Any, dims: int) -> Any:
    if not placement.is_shard() or placement.dim >= 0:
        return placement
    return type(placement)(placement.dim % dims)


class _Watch(TorchDispatchMode):
    """Records the ops on shards, and on what is made of them; a DTensor turns its own ops into these.

    It also runs ops for the shape of the whole, on other tensors: these are not recorded.

    Args:
        values: the DTensors or shards to follow.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        super().__init__()
        self.keys: list[Hashable] = []
        self.seen: list[Any] = []
        self._followed: dict[int, torch.Tensor] = {}
        self.follow(values)

    def follow(self, values: Iterable[Any]) -> None:
        """Follow the tensors among the values, too."""
        for value in values:
            for plain in plain_tensors(value) if isinstance(value, torch.Tensor) else ():
                self._followed[id(plain)] = plain

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(map(is_sharded, given)):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if any(id(x) in self._followed for x in given):
            self.follow(tree_leaves(result))
            if not _is_alias(func, args, result):
                self.seen.append(func)
                self.keys.append((func, like(args), like(kwargs or {})))
        return result


def _is_alias(op: Any, args: Any, result: Any) -> bool:
    """Return whether an op gives its operand as it is, or no tensor."""
    if op in ALIASES or not isinstance(result, torch.Tensor | tuple | list):
        return True
    return op == aten.view.default and same_sizes(args[0], result)
