"""Attention in one kernel: heads, and sequences of a batch, do not depend on one another; tokens do.

Axes: B batch, H heads of the queries, G heads of the keys and values (H is a multiple), T tokens, D features.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from mst_fx.core.aten_ops import ATTENTIONS
from mst_fx.core.sizes import number, sure
from mst_fx.placement.placement import WHOLE, Placement, Split
from mst_fx.placement.rules.registry import (
    Demand,
    Flow,
    NodePlacement,
    Spans,
    argument,
    back,
    mixed,
    rule,
    shape_of,
    takes,
)

BATCH, HEADS, TOKENS = 0, 1, 2


@rule(*ATTENTIONS)
def attention(node: Node, flow: Flow) -> NodePlacement:
    """Q [B, H, T, D], k and v [B, G, T, D] -> result [B, H, T, D], logsumexp [B, H, T]; the other results are unread.

    A group of keys and values belongs to the heads of the queries that share it.
    """
    placements = {name: flow.of(argument(node, name)) for name in ("query", "key", "value")}
    splits = {name: placement for name, placement in placements.items() if isinstance(placement, Split)}
    if any(split.dim == TOKENS for split in splits.values()):
        raise mixed(node, "lets tokens read one another")
    if any(split.dim not in (BATCH, HEADS) for split in splits.values()):
        raise mixed(node, "reads all features of a head")
    if not splits:
        if flow.of(bias_of(node)) != WHOLE:
            raise mixed(node, "has a mask that is split, and queries that are whole")
        return (WHOLE,) * len(node.meta["val"])
    share = _share(node)
    queries = splits.get("query") or _of_queries(next(iter(splits.values())), share)
    keys = _of_keys(node, queries, share)
    expected: dict[str, Placement] = {"query": queries, "key": keys, "value": keys}
    for name, placement in expected.items():
        if placements[name] == WHOLE and isinstance(placement, Split):
            raise Demand(argument(node, name), placement)
        if placements[name] != placement:
            raise mixed(node, f"reads queries split as {queries}, and a {name} split as {placements[name]}")
    _check_bias(node, flow, queries)
    return (queries, queries, *(WHOLE for _ in node.meta["val"][2:]))


@back(*ATTENTIONS)
def attention_back(node: Node, split: Split) -> dict[Node, Split]:
    """The queries are split like the result; the rule asks for the rest."""
    return {argument(node, "query"): split}


def bias_of(node: Node) -> Any:
    """Return what attention adds to its scores, or the mask that it applies; None where there is neither."""
    return next((argument(node, name) for name in ("attn_bias", "attn_mask") if takes(node, name)), None)


def _share(node: Node) -> int:
    """Return how many heads of queries share the same keys."""
    queries, keys = (shape_of(argument(node, name))[HEADS] for name in ("query", "key"))
    share = number(queries // keys)
    if share is None or not sure(keys * share == queries):
        raise mixed(node, "has a number of heads that is known only at run time")
    return share


def _of_queries(split: Split, share: int) -> Split:
    """Return how queries are split whose keys are split so."""
    return split if split.dim == BATCH else Split(HEADS, split.outer, split.inner * share)


def _of_keys(node: Node, queries: Split, share: int) -> Placement:
    """Return how the keys lie for queries that are split so: whole, if all queries share them.

    Raises:
        Spans: the queries are split into fewer heads than share keys.
    """
    if queries.dim == BATCH or share == 1:
        return queries
    if sure(shape_of(argument(node, "key"))[HEADS] == 1):
        return WHOLE
    if queries.inner % share:
        raise Spans(node, [(1, share // queries.inner)] if share % queries.inner == 0 else [])
    return Split(HEADS, queries.outer, queries.inner // share)


def _check_bias(node: Node, flow: Flow, queries: Split) -> None:
    """Raise a refusal, or a `Demand`, unless a mask of each head, or of each sequence, is split like the queries."""
    bias = bias_of(node)
    if bias is None:
        return
    shape = shape_of(bias)
    dim = queries.dim - 4 + len(shape)
    alone = dim < 0 or sure(shape[dim] == 1)
    expected: Placement = WHOLE if alone else queries.moved(dim)
    if flow.of(bias) == WHOLE and isinstance(expected, Split):
        raise Demand(bias, expected)
    if flow.of(bias) != expected:
        raise mixed(node, f"has a mask placed as {flow.of(bias)}, and queries split as {queries}")
