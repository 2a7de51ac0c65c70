"""The reader of a captured graph tells what a torch-level node is, however the user spelled it.

It goes by the aten ops that the node decomposes into, so `F.linear`, `x @ w`, `torch.addmm` and an `einsum` are all
contractions, and a custom activation of ten nodes is ten elementwise nodes. There is no list of names.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mst_fx.capture.decomposed import Decomposed
from mst_fx.core.aten_ops import (
    CONTRACTIONS,
    GROUPED_PRODUCTS,
    MADE_OF_NOTHING,
    ONE_PRODUCT,
    PICKS,
    REPEATS,
    VIEWS_AND_CASTS,
    is_random,
)
from mst_fx.core.graph_walk import ancestors, descendants, walk
from mst_fx.core.modes import TOP, Mode, modes_of
from mst_fx.core.provenance import TOP as TOP_BORDERS
from mst_fx.core.provenance import Borders
from mst_fx.core.refusal import Refusal
from mst_fx.core.sizes import is_size
from mst_fx.core.values import fake_value, is_view, storages_of_all, tensors_of
from mst_fx.placement.rules.contraction import factors
from mst_fx.recognise.contractions import (
    Contraction,
    is_input,
    is_made_of_two,
    is_matrix,
    is_one_of_several,
    is_weight,
    numel,
    operand_of,
    rank_of,
    size_of,
)
from mst_fx.recognise.decomposed_nodes import decomposed_nodes, reshapes_in_place
from mst_fx.recognise.effects import SWITCHES_GRADIENTS, gradients_in, rebinds, writes_data, written_by
from mst_fx.recognise.obstacles import Unmatched, obstacle_in

aten = torch.ops.aten


class Reader:
    """Reads the nodes of one graph.

    Args:
        owner: the module that holds the graph.
        known: earlier decompositions, of this graph or another one of the same compile: a node like an earlier one
            costs nothing.
        outer: the mode that the graph runs in.
        borders: where its inputs come from, and where its outputs go.
    """

    def __init__(
        self,
        owner: GraphModule,
        known: dict[Hashable, Decomposed | None] | None = None,
        outer: Mode = TOP,
        borders: Borders = TOP_BORDERS,
    ) -> None:
        self.owner = owner
        self.outer = outer
        self.borders = borders
        self.order = {node: position for position, node in enumerate(owner.graph.nodes)}
        self.unmatched = Unmatched(self.order)
        self.modes = modes_of(owner.graph, outer)
        self.remembered: dict[Any, Any] = {}  # facts about nodes of this graph, which other stages store
        self.differentiated = ancestors(gradients_in(owner.graph))
        self._written: dict[Node, tuple[Node, ...]] = {}
        self._ops: dict[Node, set[object] | None] = {}
        self._views: dict[Node, bool] = {}
        self._contractions: dict[Node, Contraction | None] = {}
        self._decomposed = decomposed_nodes(owner, {} if known is None else known, self.modes)

    def written_by(self, node: Node) -> tuple[Node, ...]:
        """Return the operands that a node writes to, by its name, its schema, or the trace that decomposed it."""
        if node not in self._written:
            decomposed = self._decomposed.get(node)
            seen = (node.all_input_nodes[position] for position in decomposed.written) if decomposed is not None else ()
            self._written[node] = tuple(dict.fromkeys((*written_by(node), *seen)))
        return self._written[node]

    @functools.cached_property
    def data_writes(self) -> list[Node]:
        """The nodes that write to memory through `.data`."""
        return [node for node in self.owner.graph.nodes if self.written_by(node) and writes_data(node)]

    @functools.cached_property
    def switches_gradients(self) -> list[Node]:
        """The nodes that take the gradient from a value in place, or give it one."""
        nodes = self.owner.graph.nodes
        return [node for node in nodes if getattr(node.target, "__name__", node.target) in SWITCHES_GRADIENTS]

    @functools.cached_property
    def reshapes_in_place(self) -> list[Node]:
        """The nodes that give a value another shape in place."""
        return [node for node in self.owner.graph.nodes if reshapes_in_place(node)]

    @functools.cached_property
    def rebinding(self) -> list[Node]:
        """The nodes that let an operand lie in other memory."""
        return [node for node in self.owner.graph.nodes if rebinds(node)]

    @functools.cached_property
    def memory_written(self) -> dict[Node, set[torch.UntypedStorage]]:
        """The nodes that write to memory, in graph order, and the memory."""
        written = ((node, self.memory_written_by(node)) for node in self.owner.graph.nodes)
        return {node: memory for node, memory in written if memory}

    def memory_written_by(self, node: Node) -> set[torch.UntypedStorage]:
        """Return the memory that a node writes to."""
        return set() if rebinds(node) else storages_of_all(self.written_by(node))

    @functools.cached_property
    def writers(self) -> dict[torch.UntypedStorage, list[Node]]:
        """The nodes that write to each memory, in graph order."""
        found: dict[torch.UntypedStorage, list[Node]] = {}
        for node in self.owner.graph.nodes:
            for memory in self.memory_written_by(node):
                found.setdefault(memory, []).append(node)
        return found

    def made_before(self, end: Node, nodes: Iterable[Node]) -> set[Node]:
        """Return the nodes, and what is made of them in front of `end`: to walk on takes longer with each layer."""
        last = self.order[end]
        return descendants(nodes, lambda node: (user for user in node.users if self.order[user] < last))

    def decomposed(self, node: Node) -> Decomposed | None:
        """Return the aten ops of a node; None where it has none (no fake values, a data-dependent op, ...)."""
        found = self._decomposed.get(node)
        return found if found is not None and found.understood else None

    def contraction(self, node: Node) -> Contraction | None:
        """Return the node as activation times weight, None where it is something else.

        A function with a backward of its own may hold more products: an adapter, a second projection.
        """
        if node not in self._contractions:
            self._contractions[node] = self._contraction(node)
        return self._contractions[node]

    def _contraction(self, node: Node) -> Contraction | None:
        decomposed = self.decomposed(node)
        if decomposed is None or not tensors_of(node):
            return None
        products = [op for op in decomposed.ops if op.target in CONTRACTIONS]
        if len(products) > 1 and decomposed.backward:
            size = max(map(size_of, tensors_of(node)))
            products = [op for op in products if size_of(op.meta["val"]) == size and is_made_of_two(decomposed, op)][:1]
        return self._contraction_by(node, decomposed, products[0]) if len(products) == 1 else None

    def inner_contractions(self, node: Node) -> list[Contraction]:
        """Return the contractions of a function with a backward of its own, if the first widens and its value is small.

        Such a function holds a whole MLP, or a head with its loss.
        """
        decomposed = self.decomposed(node)
        if decomposed is None or not decomposed.backward or not tensors_of(node):
            return []
        products = [op for op in decomposed.ops if op.target in CONTRACTIONS]
        found = [self._contraction_by(node, decomposed, op) for op in products]
        first = found[0] if found else None
        if first is None or not self.numel(node) <= self.numel(first.activation) < size_of(products[0].meta["val"]):
            return []
        return [contraction for contraction in found if contraction is not None]

    def _contraction_by(self, node: Node, decomposed: Decomposed, product: Node) -> Contraction | None:
        """Return a product that a node decomposes into, as operands of the node."""
        left, right = (operand_of(node, decomposed, arg) for arg in factors(product))
        if left is None or right is None or left is right:
            return None
        weights = self._weights(left, right, product.target)
        if len(weights) != 1:
            return None
        activation, weight = (left, right) if weights == [right] else (right, left)
        return Contraction(activation, weight, rank_of(weight) == 3 and product.target not in ONE_PRODUCT)

    def _weights(self, left: Node, right: Node, product: object) -> list[Node]:
        """Return the factors that are weights: made of parameters, or an input that looks like a weight."""
        found = [operand for operand in (left, right) if self.is_learnt(operand)]
        if found:
            return found  # two learnt factors merge an adapter into its weight: there are no tokens
        roots = {operand: self._input_behind(operand) for operand in (left, right)}
        if rank_of(left) == rank_of(right) == 3 and product not in ONE_PRODUCT:
            return [operand for operand, root in roots.items() if is_input(root) and rank_of(root) == 3]
        if product in GROUPED_PRODUCTS:
            return [right]
        weight = left if is_weight(left) and not is_weight(right) else right
        return [weight] if is_matrix(weight) or rank_of(weight) == 1 else []

    def widening(self, node: Node) -> Contraction | None:
        """Return the node as a contraction that makes more elements than its activation has, None where it is none.

        For an activation of low rank, the value that it was projected from counts: an adapter restores that size.
        """
        contraction = self.contraction(node)
        if contraction is None or self.numel(node) <= self.numel(self.unprojected(contraction.activation)):
            return None
        return contraction

    def unprojected(self, activation: Node) -> Node:
        """Return the value that an activation of low rank was projected from; any other activation as it is.

        For a projection that narrows what another one has widened, as in an MLP, the input of the latter counts.
        """
        origin = activation
        while self.contraction(origin) is None and len(self.tensor_operands(origin)) == 1:
            (origin,) = self.tensor_operands(origin)
        before = self.contraction(origin)
        if before is None or self.numel(before.activation) <= self.numel(activation):
            return activation
        narrow = self._widened_from(before.activation)
        return before.activation if narrow is None else max(narrow, activation, key=self.numel)

    def _widened_from(self, large: Node) -> Node | None:
        """Return what a contraction made a large value of, directly or by way of values as large; None if none did."""

        def as_large(node: Node) -> list[Node]:
            operands = self.tensor_operands(node) if self.contraction(node) is None else []
            return [operand for operand in operands if self.numel(operand) >= self.numel(large)]

        origins = list[Node]()
        for node in walk([large], as_large):
            contraction = self.contraction(node)
            if contraction is not None and self.numel(contraction.activation) < self.numel(node):
                origins.append(self.unprojected(contraction.activation))
        return max(origins, key=self.numel, default=None)

    def ops(self, node: Node) -> set[object] | None:
        """Return the ops that a node decomposes into, without those that compute sizes; None where that fails."""
        if node not in self._ops:
            decomposed = self.decomposed(node)
            calls = [op for op in decomposed.ops if op.op == "call_function"] if decomposed is not None else []
            found: set[object] = {op.target for op in calls if not is_size(op.meta.get("val"))}
            self._ops[node] = found if decomposed is not None else None
        return self._ops[node]

    def is_view(self, node: Node) -> bool:
        """Return whether the node's value lies in the memory of its operands."""
        if node not in self._views:
            self._views[node] = is_view(node)
        return self._views[node]

    def does(self, node: Node, ops: tuple[object, ...]) -> bool:
        """Return whether the node decomposes into one of the ops, among others."""
        return not (self.ops(node) or set()).isdisjoint(ops)

    def unviewed(self, node: Node) -> Node:
        """Return the value that a node views or casts; the node itself where it does neither."""
        while not (is_input(node) or is_one_of_several(node)) and self._does_only(node, VIEWS_AND_CASTS):
            node = node.all_input_nodes[0]
        return node

    def is_learnt(self, node: Node) -> bool:
        """Return whether a value is made of parameters alone."""
        key = ("learnt", node)
        if key not in self.remembered:
            operands = self.tensor_operands(node)
            parameter = isinstance(fake_value(node), torch.nn.Parameter)
            self.remembered[key] = parameter or (bool(operands) and all(map(self.is_learnt, operands)))
        learnt: bool = self.remembered[key]
        return learnt

    def _input_behind(self, node: Node) -> Node:
        """Return the graph input that a node views, casts or picks rows of; otherwise some value that is no input."""
        while not is_input(node) and self._does_only(node, PICKS):
            node = node.all_input_nodes[0]
        return node

    def _does_only(self, node: Node, ops: tuple[object, ...]) -> bool:
        """Return whether a node computes its value from operands with these ops alone."""
        found = self.ops(node)
        return found is not None and found <= {*ops} and bool(node.all_input_nodes)

    def fills(self, node: Node) -> bool:
        """Return whether the node makes new memory: of one value, uninitialised, or of positions."""
        found = self.ops(node) or set()
        return bool(found) and found <= {*MADE_OF_NOTHING}

    def repeats(self, node: Node) -> Node | None:
        """Return the operand that the node repeats, or picks rows of more than once; None where it does neither."""
        if not self._does_only(node, (*PICKS, *REPEATS)) or not self.does(node, REPEATS):
            return None
        operand = node.all_input_nodes[0]
        return operand if self.numel(node) > self.numel(operand) else None

    def rank(self, node: Node) -> int:
        """Return the number of dims of the node's value, -1 where it is no tensor."""
        return rank_of(node)

    def tensor_operands(self, node: Node) -> list[Node]:
        """Return the operands that are tensors or tuples of tensors: no sizes, no subgraphs."""
        return [operand for operand in node.all_input_nodes if tensors_of(operand)]

    def multiplies(self, node: Node) -> bool:
        """Return whether the node decomposes into a matrix product of any kind, as attention does."""
        return self.does(node, CONTRACTIONS)

    def is_one_product(self, node: Node) -> bool:
        """Return whether the node decomposes into one matrix product, among other ops."""
        decomposed = self.decomposed(node)
        return decomposed is not None and sum(op.target in CONTRACTIONS for op in decomposed.ops) == 1

    def obstacle(self, node: Node) -> Refusal | None:
        """Return why a region must not contain this node; None where each of its ops has a placement rule."""
        contraction = self.contraction(node)
        return obstacle_in(node, self.decomposed(node), contraction.activation if contraction is not None else None)

    def is_pure(self, node: Node) -> bool:
        """Return whether the node only computes its value: it writes nothing and draws no random numbers."""
        return not self.written_by(node) and self.is_known(node)

    def is_known(self, node: Node) -> bool:
        """Return whether the pass knows what the node computes or writes, and it draws no random numbers."""
        if is_size(fake_value(node)):
            return node.op.startswith("call_")
        decomposed = self.decomposed(node)
        ops = (*decomposed.ops, *decomposed.backward) if decomposed is not None else ()
        return decomposed is not None and not any(is_random(op.target) for op in ops)

    def numel(self, node: Node) -> int:
        """Return the number of elements of the node's captured value; for a tuple, the sum over its tensors."""
        return numel(node)
