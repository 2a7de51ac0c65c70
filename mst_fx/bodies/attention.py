"""A loop over groups of heads: its projections, and attention's backward from what the forward has kept.

Attention is as expensive backward as forward is, or more; its backward op reads the result and the logsumexp, so that
the forward op need not run again. Both are results of the loop in the forward.

Axes: B batch, H heads, T tokens, D features of a head.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node, map_arg

from mst_fx.core.aten_ops import ATTENTION_GRADIENTS, ATTENTIONS, CONTRACTIONS, PERMUTES, RESHAPES
from mst_fx.core.graph_walk import in_order
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.partition import Stages
from mst_fx.placement.placement import PARTIAL, WHOLE, split_of
from mst_fx.placement.rules import argument, takes
from mst_fx.placement.rules.attention import bias_of
from mst_fx.placement.rules.view import dim_permutation

aten = torch.ops.aten
RESULT, LOGSUMEXP = 0, 1
ChunkShape: TypeAlias = Callable[[Node], Sequence[int]]


@dataclass(frozen=True)
class Kept:
    """What the loop gives of attention, and its backward reads.

    Attributes:
        result: a result of the loop: attention's, or a view of it.
        views: the ops that make `result` of attention's own one, in order.
        logsumexp: a result of the loop.
    """

    result: Node
    views: tuple[Node, ...]
    logsumexp: Node


def part_biases(graph: Graph) -> None:
    """Make a product, and a sum with its bias, of products with a bias that the graph returns.

    The product adds up over the heads; the bias is added once, behind the loop.
    """
    for returned in graph.output_node().all_input_nodes:
        node: Any = returned
        while node.target in RESHAPES:
            node = node.args[0]
        if node.target != aten.addmm.default or node.kwargs or len(node.args) > 3:
            continue
        bias, *operands = node.args
        with graph.inserting_before(node):
            product = graph.call_function(aten.mm.default, tuple(operands))
            total = graph.call_function(aten.add.Tensor, (product, bias))
        for made in (product, total):
            made.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def with_projections(stages: Stages, needs_grad: Mapping[Node, bool]) -> Stages:
    """Return the stages with a projection for each product of a whole value and a split one, with a gradient.

    The gradient of the whole value, the tokens, would add up over the chunks; that of a projection does not.
    """
    placements = stages.placements.of
    products = (node for node in stages.loop if node.target in CONTRACTIONS and split_of(placements[node]) is not None)
    made_of_whole = (
        node for node in products if needs_grad[node] and any(placements[x] == WHOLE for x in node.all_input_nodes)
    )
    return replace(stages, projections=tuple(made_of_whole))


def with_sums(stages: Stages) -> Stages:
    """Return the stages with a product that adds up over the heads as a sum.

    The loop gives what the product reads, in place of its parts: these would have to add up. In backward, the gradient
    of what it reads is made a chunk at a time, of that of the sum.

    Raises:
        Refusal: another value adds up, or leaves the loop beside the product.
    """
    if not any(stages.placement(node) == PARTIAL for node in stages.results):
        return stages
    made: Any = stages.results[0]
    while made.target in RESHAPES and len(made.users) == 1:
        made = made.args[0]
    if len(stages.results) > 1 or made.target != aten.mm.default:
        raise Refusal(Reason.AXIS_MIXED, made, f"{made.target} adds up over the heads, beside other results")
    read: Any = made.args[0]
    return replace(stages, results=(read,), sums=stages.results)


def with_results_kept(stages: Stages, needs_grad: Mapping[Node, bool]) -> Stages:
    """Return the stages with what attention's backward reads among the results of the loop."""
    results = set(stages.results)
    placements = dict(stages.placements.of)
    for node in stages.loop:
        if node.target not in ATTENTIONS or not needs_grad[node]:
            continue
        _compute_logsumexp(node)
        if not needs_grad.get(bias_of(node)):
            result = _item(node, RESULT, placements)
            results.add(_item(node, LOGSUMEXP, placements))
            if _views_to(results, result) is None:
                results.add(result)
    return replace(
        stages,
        placements=replace(stages.placements, of=placements),
        loop=in_order(stages.graph, {*stages.loop, *results}),
        results=in_order(stages.graph, results),
    )


def _compute_logsumexp(node: Node) -> None:
    """Let an attention op compute what its backward reads: a trace without gradients has told it not to."""
    if takes(node, "compute_log_sumexp") and not argument(node, "compute_log_sumexp"):
        attention: Any = node.target
        given = dict(zip((each.name for each in attention._schema.arguments), node.args, strict=False))
        node.args = tuple({**given, "compute_log_sumexp": True}.values())
        operands, named = map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        with torch.no_grad():
            node.meta["val"] = attention(*operands, **named)


def kept_results(stages: Stages) -> dict[Node, Kept]:
    """Return what the loop keeps of each attention op, if it does."""
    found = {}
    for node in stages.loop:
        items = {user.args[1]: user for user in node.users} if node.target in ATTENTIONS else {}
        if items.get(LOGSUMEXP) in stages.results:
            views = _views_to(stages.results, items[RESULT])
            assert views is not None
            found[node] = Kept((items[RESULT], *views)[-1], views, items[LOGSUMEXP])
    return found


def _item(node: Node, position: int, placements: dict[Node, Any]) -> Node:
    """Return the node of one of several results; a new one if nobody reads it yet."""
    for user in node.users:
        if user.args[1] == position:
            return user
    with node.graph.inserting_after(node):
        item = node.graph.call_function(operator.getitem, (node, position))
    item.meta["val"] = node.meta["val"][position]
    placements[item] = placements[node][position]
    return item


def _views_to(results: Container[Node], value: Node) -> tuple[Node, ...] | None:
    """Return the ops that make a result of the loop of a value, if each can be undone; None if there is no result."""
    views: list[Node] = []
    while value not in results:
        readers = [user for user in value.users if user.target in (*RESHAPES, *PERMUTES, aten.clone.default)]
        if len(value.users) != 1 or not readers:
            return None
        (value,) = readers
        views.append(value)
    return tuple(views)


def run_on_kept(
    node: Node, kept: Kept, env: Mapping[Node, Any], known: Mapping[Node, torch.Tensor], chunk_shape: ChunkShape
) -> tuple[torch.Tensor | None, ...]:
    """Return the values of an attention op that are kept; gradients go to queries, keys and values.

    Args:
        node: the op.
        kept: what is kept of it.
        env: the values of its operands.
        known: the kept values.
        chunk_shape: gives the shape of a node's value in this chunk.
    """
    result = known[kept.result]
    for view in reversed(kept.views):
        before: Any = view.args[0]
        if view.target in PERMUTES:
            dims = dim_permutation(view)
            result = result.permute([dims.index(dim) for dim in range(len(dims))])
        elif view.target in RESHAPES:
            result = result.reshape(chunk_shape(before))
    taken = [name for name in _OF_FORWARD if takes(node, name)]
    arguments = dict(zip(taken, map_arg([argument(node, name) for name in taken], env.get), strict=True))
    others = {name: made for name, made in zip(_returned(node.target), node.meta["val"], strict=True)}
    operands = [arguments.pop(name) for name in ("query", "key", "value")]
    backward = partial(_backward, node.target, arguments, others)
    values = _OnKept.apply(backward, *operands, result, known[kept.logsumexp])
    return (*values, *(None for _ in node.meta["val"][2:]))


class _OnKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backward: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.backward_op = backward
        ctx.save_for_backward(*tensors)
        result, logsumexp = (x.view_as(x) for x in tensors[3:])
        ctx.mark_non_differentiable(logsumexp)
        return result, logsumexp

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> Any:
        return None, *ctx.backward_op(grad, *ctx.saved_tensors), None, None


_OF_FORWARD = ("query", "key", "value", "attn_bias", "attn_mask", "dropout_p", "is_causal", "scale")
"""Arguments of the forward op that the backward op takes, too."""


def _backward(
    forward: Any, arguments: Mapping[str, Any], others: Mapping[str, Any], grad: torch.Tensor, *tensors: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Call the backward op of an attention op; torch has no other name for the pair than that of the ops.

    Without dropout nothing reads the state of a random generator: memory stands for it.

    Args:
        forward: the op.
        arguments: of the op, besides queries, keys and values.
        others: fake values that the op returns besides its result, by name.
        grad: of the result.
        tensors: queries, keys, values, result and logsumexp.
    """
    queries, keys, *_ = tensors
    given: dict[str, Any] = dict(zip(("query", "key", "value", "out", "logsumexp"), tensors, strict=True))
    given |= {"grad_out": grad, "grad_out_": grad, "max_q": queries.shape[2], "max_k": keys.shape[2]}
    given |= {**arguments, "cum_seq_q": None, "cum_seq_k": None, "grad_input_mask": [True, True, True, False]}
    for name, other in (("philox_seed", "rng_state"), ("philox_offset", "unused")):
        state = others.get(name, others.get(other))
        if isinstance(state, torch.Tensor):
            given[name] = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    backward = ATTENTION_GRADIENTS[forward]
    schema = backward._schema.arguments
    positional = [given[each.name] for each in schema if not each.kwarg_only]
    return tuple(backward(*positional, **{each.name: given[each.name] for each in schema if each.kwarg_only})[:3])


@cache
def _returned(forward: Any) -> tuple[str, ...]:
    return tuple(each.name for each in forward._schema.returns)
