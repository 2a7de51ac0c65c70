"""The table of aten ops: every op that has a placement rule is classed everywhere, and classed as torch treats it.

Where torch differs today, the op stands in a set below, with the reason; a new op must not join it unseen.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from arguments import draw_call
from recipes import Draw
from torch._functorch.partitioners import get_default_op_list
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import fallbacks
from torch.utils._pytree import tree_leaves, tree_map_only

from mst_fx.core import aten_ops as table
from mst_fx.core.torch_private.collectives import COLLECTIVES
from mst_fx.ops.overwritten import overwritten
from mst_fx.ops.own_gradients import own_gradients, upstream
from mst_fx.placement.rules import rule_for
from mst_fx.placement.rules.registry import _RULES

aten = torch.ops.aten

OURS = (overwritten, upstream, own_gradients)
"""No compiler of torch's sees these ops."""
RULED = sorted({op for op in _RULES if op not in ("pointwise", *OURS)}, key=str)
"""The ops of torch that have a rule of their own."""
OF_SOME_DEVICES = (*table.GROUPED_PRODUCTS, *table.SCALED_PRODUCTS, *table.LAYER_NORMS, *table.ATTENTIONS)
DRAWN = [op for op in RULED if op not in (*OF_SOME_DEVICES, *COLLECTIVES)]
"""Those that can be called on any CPU, in any dtype; of the others it is known that their backward reads operands."""

KERNELS = {"view": table.SHOWS_MEMORY, "unfused": table.UNFUSED, "fused": table.FUSED}
BACKWARD = {"dear": frozenset([*table.CONTRACTIONS, *table.ATTENTIONS, *COLLECTIVES]), "recomputed": table.RECOMPUTED}
READING = {
    "contraction": table.CONTRACTIONS,
    "view or pick": table.PICKS,
    "repeat": table.REPEATS,
    "for callers": table.SHOWN_TO_CALLERS,
    "made of nothing": table.MADE_OF_NOTHING,
    "sort": table.SORTS,
    "computes": table.COMPUTES,
}

FUSED_WITHOUT_A_KERNEL = {
    **dict.fromkeys(
        (aten.cumprod.default, aten.cummax.default, aten.cummin.default, aten.logcumsumexp.default),
        "a scan like cumsum, which is unfused: no kernel on a CPU",
    ),
    aten.index_reduce.default: "decomposed before it is lowered, and a call of ATen where that is not done",
    **dict.fromkeys(
        (aten.median.default, aten.median.dim, aten.kthvalue.default, aten.mode.default), "a call of ATen before 2.13"
    ),
    aten.nanmedian.default: "a call of ATen",
    aten.nanmedian.dim: "a call of ATen",
    aten._adaptive_avg_pool3d.default: "a call of ATen",
    aten.randint.low: "Inductor replaces draws by its own generator before it lowers the graph",
}
"""Counted as fused by `liveness`, though Inductor calls ATen: their operands and results lie in memory."""

VIEWS_THAT_COUNT_AS_MEMORY = {
    aten.detach.default: "`liveness` sees through it; `temporary_bytes` and the choice of the axis count it",
    aten.alias.default: "as detach",
    aten.diagonal.default: "a view that all of them count",
    aten.unfold.default: "a view that all of them count",
}
"""Views by their schema that are not among `VIEWS`."""

SAVED_BY_TORCH = {
    **dict.fromkeys(
        (*table.SORTS, *table.COUNTS, *table.SORTED_SEARCHES, aten.bucketize.Tensor, aten.topk.default),
        "integers or an order: no gradient of theirs is counted, but they are not computed again",
    ),
    **dict.fromkeys(
        (aten.cumsum.default, aten.cumprod.default, aten.cummax.default, aten.cummin.default),
        "a scan is computed once",
    ),
    aten.logcumsumexp.default: "a scan is computed once",
    **dict.fromkeys((*table.SCATTERS, *table.PUTS, *table.SLICE_WRITES, aten.copy.default), "a write is done once"),
    **dict.fromkeys((aten.embedding.default, aten.repeat.default), "more rows than there were are made once"),
    **dict.fromkeys(
        (aten.prod.default, aten.prod.dim_int, aten.argmin.default, aten.median.default, aten.median.dim),
        "a reduction that torch's list lacks",
    ),
    **dict.fromkeys(
        (aten.nanmedian.default, aten.nanmedian.dim, aten.kthvalue.default, aten.mode.default),
        "a reduction that torch's list lacks",
    ),
    **dict.fromkeys(
        (aten.avg_pool2d.default, aten.avg_pool3d.default, aten.constant_pad_nd.default),
        "torch's list lacks it",
    ),
    **dict.fromkeys((aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default), "torch's list lacks it"),
    **dict.fromkeys(
        (aten.unbind.int, aten.split_with_sizes.default, aten.diagonal.default, aten.unfold.default),
        "a view: what is saved is the memory that it shows",
    ),
    aten.randint.low: "random numbers are drawn once",
}
"""Taken for computed again in backward, while AOTAutograd's partitioner saves the result: it is not on its list."""

READS_NOTHING = {
    **dict.fromkeys(
        (aten.alias.default, aten.diagonal.default, aten.unfold.default, aten.lift_fresh_copy.default),
        "a view or a copy",
    ),
    **dict.fromkeys(
        (*table.TILES, *table.FLIPS, *table.ROLLS, *table.PADS, *table.TRIANGLES, *table.CHANNEL_SHUFFLES),
        "values are moved",
    ),
    **dict.fromkeys(table.PIXEL_SHUFFLES, "values are moved"),
    **dict.fromkeys((aten.embedding.default, aten.index_select.default), "rows are picked, as by index.Tensor"),
    **dict.fromkeys((aten.cumsum.default, aten.mean.default, aten.rsub.Tensor), "linear, as sum and sub are"),
    **dict.fromkeys(
        (aten.copy.default, aten.zero.default, aten.fill.Scalar, aten.fill.Tensor, aten.index_fill.int_Scalar),
        "what was there does not matter",
    ),
    **dict.fromkeys(
        (aten.scatter.src, aten.scatter.value, aten.scatter.reduce, aten.scatter.value_reduce),
        "indices are read, no operand",
    ),
    **dict.fromkeys((aten.scatter_add.default, *table.PUTS, *table.SLICE_WRITES), "indices are read, no operand"),
    **dict.fromkeys(
        (aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default, aten.kthvalue.default),
        "the positions that were found are read, no operand",
    ),
    **dict.fromkeys((*table.SORTS, aten.topk.default), "the order is read, no operand"),
}
"""Their backward reads no operand, yet what they read counts as saved: the prediction is too large."""


@pytest.mark.parametrize("op", RULED, ids=str)
def test_an_op_with_a_rule_is_classed(op):
    for what, classes in (("kernels", KERNELS), ("backward", BACKWARD)):
        named = [name for name, ops in classes.items() if op in ops]
        assert len(named) == 1, f"{op} has a placement rule and is classed as {named} for {what}"
    assert any(op in ops for ops in READING.values()), f"{op} has a placement rule, and no class for reading"


@pytest.mark.parametrize("classes", [KERNELS, BACKWARD, READING], ids=["kernels", "backward", "reading"])
def test_a_class_holds_ops_with_rules(classes):
    """What has no rule is not recomputed, and refused before anybody reads it as something."""
    without = {op for ops in classes.values() for op in ops if rule_for(op) is None and op is not operator.getitem}
    in_bodies = {aten.as_strided.default, *table.ATTENTION_GRADIENTS.values()}  # what `log_softmax` keeps in memory
    assert without <= in_bodies


def test_no_exception_outlives_its_op():
    for exceptions in (FUSED_WITHOUT_A_KERNEL, VIEWS_THAT_COUNT_AS_MEMORY, SAVED_BY_TORCH, READS_NOTHING):
        assert exceptions.keys() <= {*RULED}


def test_views_are_views():
    """By their schema: the result shares memory with an operand."""
    shown = {op for op in RULED if any(result.alias_info is not None for result in op._schema.returns)}
    assert shown - {*table.VIEWS} == VIEWS_THAT_COUNT_AS_MEMORY.keys()
    assert {*table.VIEWS} - shown == {aten._unsafe_view.default, operator.getitem}


def test_what_is_fused_has_a_kernel():
    decomposed = select_decomp_table()
    called = {op for op in table.FUSED if op in fallbacks and op not in decomposed}
    assert called <= FUSED_WITHOUT_A_KERNEL.keys()


def test_what_is_recomputed_is_on_the_list_of_torch():
    """Ops that Inductor decomposes are not on it; what they decompose into is."""
    lists, decomposed = get_default_op_list(), select_decomp_table()
    known = {*lists.recomputable_ops} - {*lists.compute_intensive_ops, *lists.random_ops}
    saved = {op for op in RULED if op in table.RECOMPUTED and op.overloadpacket not in known and op not in decomposed}
    assert saved <= SAVED_BY_TORCH.keys()


def saved_by(op) -> list[torch.Tensor] | None:
    """The floating-point values that autograd saves for the backward of some calls; None where there is none."""
    draw, saved, calls = Draw(f"saved by {op}"), [], 0
    for _ in range(6):
        drawn = draw_call(op, draw)
        assert drawn is not None, f"no call of {op._schema} was found that runs"
        args, kwargs = tree_map_only(torch.Tensor, leaf, (drawn.args, drawn.kwargs))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), quiet():
            try:
                results = tree_leaves(op(*args, **kwargs))
            except RuntimeError:
                continue  # it does not run with a gradient for this dtype or option
        histories = [x.grad_fn for x in results if isinstance(x, torch.Tensor) and x.grad_fn is not None]
        calls += any(not history.name().endswith("NotImplemented") for history in histories)
    return [x for x in saved if x.is_floating_point() and x.numel()] if calls else None


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("op", DRAWN, ids=str)
def test_the_backward_of_linear_ops_alone_reads_nothing(op):
    saved = saved_by(op)
    if saved is not None:
        assert (not saved) == (op in table.LINEAR or op in READS_NOTHING), f"autograd saves {len(saved)} values of {op}"


def test_a_product_of_two_reads_the_other():
    for op in (aten.mul.Tensor, aten.mm.default, aten.bmm.default):
        a, b = (torch.randn(2, 2, 2) if op is aten.bmm.default else torch.randn(2, 2) for _ in range(2))
        for x, y in ((a, b), (b, a)):
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
                op(x.requires_grad_(), y.detach())
            assert {t.data_ptr() for t in saved} == {y.data_ptr()}
            assert op in table.BILINEAR - table.LINEAR
