"""What a loop over a region has to do: how gradients are made, which there are, and who shares it."""

from __future__ import annotations

import pytest
import torch
from graphs import captured, region_of, sketched

import mst_fx
from mst_fx.bodies.work import analysed, fix_for
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.rules.counting import DISTINCT
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import close

T, D, V = 6, 4, 16


def leaves(*shapes, dtype=torch.float32, needs=True):
    return [torch.randn(shape, dtype=dtype, requires_grad=needs) for shape in shapes]


def work_of(fn, inputs=None, returned=0, known=None, capture=sketched, **options):
    inputs = leaves((T, D), (D, V)) if inputs is None else inputs
    return analysed(region_of(capture(fn, *inputs), returned), mst_fx.Config(**options), {} if known is None else known)


def head(x, w):
    return (x @ w).logsumexp(-1)


def loss(x, w):
    return head(x, w).sum()


@pytest.mark.parametrize(
    ("fn", "dtype", "needs", "backward"),
    [
        (head, torch.float32, True, "recompute"),
        (loss, torch.float32, True, "in_forward"),
        (loss, torch.bfloat16, True, "in_forward"),
        (loss, torch.float16, True, "recompute"),  # gradients need the factor of a scaler when they are made
        (loss, torch.float32, False, "none"),
        (lambda x, w: (x * w[0, :D]).exp().sum(), torch.float32, True, "recompute"),  # it costs no product
        (lambda x, w: ((x @ w).sum(), (x @ w).exp().sum()), torch.float32, True, "recompute"),
        (lambda x, w: (x @ w).argmax(-1), torch.float32, True, "none"),
    ],
)
def test_how_gradients_are_made(fn, dtype, needs, backward):
    work = work_of(fn, leaves((T, D), (D, V), dtype=dtype, needs=needs))
    assert work.backward == backward
    assert bool(work.wanted) == bool(work.differentiable) == (backward != "none")


def test_gradients_of_what_needs_one():
    frozen = [*leaves((T, D)), *leaves((D, V), needs=False)]
    assert work_of(head, frozen).wanted == (0,)
    assert work_of(head).wanted == (0, 1)

    def partly(x, w, v):
        wide = x @ w
        return wide.logsumexp(-1), wide.argmax(-1), (x.detach() @ v).logsumexp(-1).detach()

    work = work_of(partly, leaves((T, D), (D, V), (D, V)))
    assert [work.stages.operands[i].name for i in work.wanted] == ["arg0_1", "arg1_1"]
    assert work.differentiable == (0,)


def with_logits(x, w):
    logits = x @ w
    return logits, logits.logsumexp(-1).sum()


def test_returned_values_exist_anyway_and_are_read_again_in_backward():
    work = work_of(with_logits, returned=1)
    assert [work.stages.results[i].meta["val"].shape for i in work.reused] == [(T, V)]
    assert work_of(with_logits).reused == ()
    detached = work_of(with_logits, returned=1, returned_logits="detach")
    assert (detached.backward, detached.reused) == ("in_forward", ())


def test_returned_values_that_no_other_gradient_passes_are_not_read():
    """Nor saved: who gets them may write to them."""

    def program(x, w):
        logits = x @ w
        return logits, logits.argmax(-1)

    work = work_of(program, returned=1)
    assert (work.backward, work.differentiable, work.reused) == ("recompute", (0,), ())


def test_regions_that_are_alike_share_their_work():
    known = {}
    work = work_of(head, known=known)
    assert work_of(head, known=known) is work
    others = [
        work_of(head, leaves((T + 1, D), (D, V)), known=known),
        work_of(head, leaves((T, D), (D, V), needs=False), known=known),
        work_of(lambda x, w: head(x, w).detach(), known=known),
        work_of(lambda x, w: head(x, w) * 1, known=known),
    ]
    assert len({work, *others}) == len(known) == 5


def picked(x):
    return x.topk(D)[1] * x.sum(-1, keepdim=True)


def ordered(x):
    return x.sort()[1] * x.sum(-1, keepdim=True)


def test_what_a_top_k_picks_is_known_to_be_distinct():
    known, works = {}, []
    for fn in (picked, ordered):
        gm = sketched(fn, *leaves((T, D), needs=False))
        *_, total, product = (node for node in gm.graph.nodes if node.op.startswith("call"))
        works.append(analysed(close(Reader(gm), [total, product], total.all_input_nodes[0]), mst_fx.Config(), known))
    placeholders = [node for work in works for node in work.stages.graph.find_nodes(op="placeholder")]
    assert [node.meta[DISTINCT] for node in placeholders] == [False, True, False, False]


def test_modes_tell_regions_apart():
    def unrecorded(x, w):
        with torch.no_grad():
            wide = x @ w
        return (wide * x.sum(-1, keepdim=True)).logsumexp(-1)

    def recorded(x, w):
        wide = x @ w
        return (wide * x.sum(-1, keepdim=True)).logsumexp(-1)

    known = {}
    works = [work_of(fn, capture=captured, known=known) for fn in (unrecorded, recorded)]
    assert [work.wanted for work in works] == [(0,), (0, 1)]


def test_a_refusal_is_told_in_the_words_of_the_captured_graph():
    x, w = leaves((T, D), (D, V))
    torch._dynamo.mark_dynamic(w, 1)
    region = region_of(captured(lambda x, w: (x @ w).logsumexp(-1), x, w))
    with pytest.raises(Refusal) as refusal:
        analysed(region, mst_fx.Config(), {})
    assert (refusal.value.reason, refusal.value.node) == (Reason.DYNAMIC, region.nodes[0])
    (weight,) = (node for node in region.live_ins if node.name.startswith("l_w"))
    assert weight.name in refusal.value.text


@pytest.mark.parametrize(
    ("fn", "shape", "dtype", "reason"),
    [
        (lambda x, w: x @ w.conj(), (T, D), torch.complex64, Reason.COMPLEX),
        (lambda x, w: (x.cumsum(0) @ w).softmax(0), (T, D), torch.float32, Reason.AXIS_MIXED),
        (head, (1, D), torch.float32, Reason.SHAPE),
    ],
)
def test_regions_without_a_loop(fn, shape, dtype, reason):
    known = {}
    with pytest.raises(Refusal) as refusal:
        work_of(fn, leaves(shape, (D, V), dtype=dtype), known=known)
    assert refusal.value.reason == reason
    assert known == {}


def test_only_the_longest_dim_varies_and_others_are_fixed_where_it_is_looped():
    x = torch.randn(2, T, D)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    gm = captured(lambda x, w: head(x, w), x, torch.randn(D, V))
    region = region_of(gm)
    batch, length, _ = region.stream.meta["example_value"].shape
    known, names = f"Eq({batch}, 2)", {str(batch), str(length)}
    with pytest.raises(Refusal) as refusal:
        analysed(region, mst_fx.Config(), {}, marked=names)
    assert refusal.value.reason == Reason.DYNAMIC
    work = analysed(region, mst_fx.Config(), {})
    assert (work.sizes, str(work.stages.length)) == ((batch,), str(length))
    guards = batch.node.shape_env.guards
    before = len(guards)
    fix_for(region, work)
    assert [str(guard.expr) for guard in guards[before:]] == [known]
