from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from experts import (
    DENSE,
    FORMS,
    GROUPED,
    D,
    E,
    Experts,
    K,
    einsum,
    ends_of_groups,
    gated,
    grouped,
    routed,
    sorted_and_brought_back,
)
from graphs import assert_idempotent, captured, rewritten, text
from memory_probe import peak_bytes, saved_bytes
from numerics import assert_as_good_as_eager, gradients, looped, relative_error
from torch import nn

import mst_fx
from mst_fx.core.aten_ops import GROUPED_PRODUCTS
from mst_fx.runtime.mini_sequence import CallSpec, mini_sequence

N = 24


def tokens(*shape):
    return torch.randn(*(shape or (N, D)), generator=torch.Generator().manual_seed(0))


def model(form, **sizes):
    torch.manual_seed(0)
    return Experts(form, **sizes).bfloat16()  # a grouped product is compiled in this precision only


def inputs():
    return tokens().bfloat16(), routed(N)


class TestGolden(expecttest.TestCase):
    def test_sorted_and_brought_back(self):
        gm = captured(model(sorted_and_brought_back), *inputs())
        self.assertExpectedInline(
            text(gm),
            """\
placeholder l_self_modules_router_parameters_weight_
placeholder l_x_nd_
placeholder l_experts_nk_
placeholder l_self_parameters_up_
placeholder l_self_parameters_down_
linear = linear(l_x_nd_, l_self_modules_router_parameters_weight_, None)
softmax = .softmax(linear, -1)
weights_NK = .gather(softmax, -1, l_experts_nk_)
reshape = .reshape(l_experts_nk_, -1)
sort = sort(reshape)
keys = getitem(sort, 0)
order = getitem(sort, 1)
float_1 = .float(keys)
counts = histc(float_1, 4, 0, 3)
cumsum = .cumsum(counts, 0)
ends = .to(cumsum, torch.int32)
floordiv = floordiv(order, 2)
getitem_2 = getitem(l_x_nd_, floordiv)
rows = _grouped_mm(getitem_2, l_self_parameters_up_, offs=ends, bias=None, out_dtype=None)
chunk = .chunk(rows, 2, -1)
gate = getitem(chunk, 0)
up = getitem(chunk, 1)
silu = silu(gate)
mul = mul(silu, up)
_grouped_mm_1 = _grouped_mm(mul, l_self_parameters_down_, offs=ends, bias=None, out_dtype=None)
reshape_1 = .reshape(weights_NK, -1)
getitem_5 = getitem(reshape_1, order)
unsqueeze = .unsqueeze(getitem_5, -1)
rows_1 = mul(_grouped_mm_1, unsqueeze)
inverse = empty_like(order)
arange = arange(48, device=cpu)
setitem = setitem(inverse, order, arange)
getitem_6 = getitem(rows_1, inverse)
view = .view(getitem_6, 24, 2, -1)
sum_1 = .sum(view, -2)
return (sum_1)
""",
        )
        after, _ = rewritten(gm)
        self.assertExpectedInline(
            text(after),
            """\
placeholder l_self_modules_router_parameters_weight_
placeholder l_x_nd_
placeholder l_experts_nk_
placeholder l_self_parameters_up_
placeholder l_self_parameters_down_
linear = linear(l_x_nd_, l_self_modules_router_parameters_weight_, None)
softmax = .softmax(linear, -1)
get_attr mini_sequence_forward_0
get_attr mini_sequence_backward_0
mini_sequence = mini_sequence(
    mini_sequence_forward_0, None, mini_sequence_backward_0, None,
    recompute,
    (4, ((0, 1, 1), (0, 1, 1), (0, 1, 1), None, None), ((cat, 0, 1, 1)), ()),
    (4, ((0, 1, 1), (0, 1, 1), (0, 1, 1), (0, 1, 1), None, None), ((cat, 0, 1, 1), (grouped, torch.float32, torch.bfloat16), (grouped, torch.float32, torch.bfloat16)), ()),
    (0),
    (0, 3, 4),
    (),
    False,
    0,
    softmax, l_experts_nk_, l_x_nd_, l_self_parameters_up_, l_self_parameters_down_)
getitem = getitem(mini_sequence, 0)
return (getitem)
""",
        )

    def test_the_gradients_of_matrices_leave_the_body_as_factors(self):
        """Rows of both sides and where groups end; `test_forms` has the numbers."""
        after, _ = rewritten(captured(model(sorted_and_brought_back), *inputs()))
        body = after.mini_sequence_backward_0.graph
        self.assertExpectedInline(
            "\n".join(f"{tuple(x.meta['val'].shape)} {x.meta['val'].dtype}" for x in body.output_node().args[0]),
            """\
(4, 4) torch.bfloat16
(8, 8) torch.bfloat16
(8, 48) torch.bfloat16
(4,) torch.int32
(8, 24) torch.bfloat16
(8, 8) torch.bfloat16
(4,) torch.int32""",
        )
        products = [node.args[1].meta["val"].dim() for node in body.nodes if node.target in GROUPED_PRODUCTS]
        assert products == [3, 3, 3]  # two again, and one back: each is of rows, none makes matrices


def test_rewriting_twice_changes_nothing():
    assert_idempotent(model(sorted_and_brought_back), *inputs())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms(form):
    report = assert_as_good_as_eager(
        model(form),
        inputs(),
        step=lambda m, *args: m(*args).square().sum(),
        dtype=torch.bfloat16 if form in GROUPED else torch.float32,
        chunk_tokens=7,
    )
    (region,) = report.regions
    assert region.chunks == 4
    assert not report.refusals


def swapped(matrices):
    """As a layer keeps them: [out, in]."""
    return matrices.transpose(-2, -1)


def three_matrices(x, weights, experts, gate, up, down):
    """Rows added to their tokens by index; the forward of torchtitan."""
    order = experts.view(-1).argsort(stable=True)
    ends = ends_of_groups(experts.view(-1), E)
    rows = x[order // K]
    hidden = F.silu(grouped(rows, swapped(gate), ends)) * grouped(rows, swapped(up), ends)
    rows = grouped(hidden, swapped(down), ends) * weights.view(-1)[order, None]
    return torch.zeros_like(x).index_add(0, order // K, rows)


def with_biases(x, weights, experts, up, up_bias, down, down_bias):
    """Every other column is a gate, and each row takes the biases of its expert; the forward of gpt-oss."""
    keys, order = experts.reshape(-1).sort()
    ends = ends_of_groups(keys, E)
    hidden = grouped(x[order // K], up, ends).add_(up_bias[keys])
    gate, value = hidden[..., ::2].clamp(max=7), hidden[..., 1::2].clamp(-7, 7)
    hidden = (value + 1) * gate * torch.sigmoid(gate * 1.702)
    rows = (grouped(hidden, down, ends) + down_bias[keys]) * weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return rows[inverse].view(-1, K, x.shape[1]).sum(1)


FF = 24
OTHERS = {
    "three matrices": (three_matrices, [(E, FF, D), (E, FF, D), (E, D, FF)]),
    "biases": (with_biases, [(E, D, 2 * FF), (E, 2 * FF), (E, FF, D), (E, D)]),
    "biases, columns in memory": (with_biases, [(E, D, 2 * FF), (E, 2 * FF), (E, FF, D), (E, D)]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_forms_with_other_matrices(name):
    form, shapes = OTHERS[name]
    torch.manual_seed(0)
    matrices = [torch.randn(shape) * 0.3 for shape in shapes]
    if "columns" in name:
        matrices = [x.mT.contiguous().mT for x in matrices]
    m, weights = nn.ParameterList(matrices), torch.rand(N, K)

    def step(m, x, weights, chosen):
        return form(x, weights, chosen, *(m[i] for i in range(len(shapes)))).float().square().sum()

    chosen = routed(N)
    assert_as_good_as_eager(m, (tokens(), weights, chosen), step=step, dtype=torch.bfloat16, chunk_tokens=7, regions=1)
    leaves = [x.bfloat16().detach().requires_grad_() for x in (tokens(), weights, *m)]
    gm = captured(lambda x, weights, *m: form(x, weights, chosen, *m), *leaves)
    (call,) = (node for node in rewritten(gm)[0].graph.nodes if node.target is mini_sequence)
    kinds = [kind[0] for kind in CallSpec(*call.args[4]).backward_spec[3]]
    assert kinds.count("grouped") == sum(len(shape) == 3 for shape in shapes)


def test_what_experts_make_is_returned():
    def returned(x, weights, experts, up, down):
        rows = torch.bmm(gated(torch.einsum("nd,edf->enf", x, up)), down)
        return torch.bmm(weights[:, None, :1].expand(-1, 1, E), rows.transpose(0, 1)), rows

    _, report = rewritten(captured(model(returned), *inputs()))
    assert not report.regions
    assert {entry.reason for entry in report.refusals} == {"ESCAPES"}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_weights_that_are_no_parameters(form):
    m = model(form)
    weights = [x.detach().requires_grad_() for x in (m.up, m.down)]
    scores = torch.rand(N, K).bfloat16().requires_grad_()
    x, chosen = inputs()
    _, report = rewritten(captured(lambda *args: m.mix(*args), x, scores, chosen, *weights))
    assert len(report.regions) == 1


def test_a_chunk_is_long_enough_for_each_expert():
    n, e = 65536, 16
    x, chosen = torch.randn(n, D).bfloat16(), torch.randint(0, e, (n, K))
    _, report = rewritten(captured(model(sorted_and_brought_back, e=e), x, chosen), chunk_tokens=None)
    (region,) = report.regions
    assert region.chunks == n // (7680 * e // K) + 1  # the most rows that a matrix gains by


def test_batches_of_sequences():
    def step(m, x, chosen):
        return m(x.view(-1, D), chosen).view(x.shape).square().sum()

    report = assert_as_good_as_eager(
        model(sorted_and_brought_back), (tokens(3, 8, D), routed(N)), step=step, dtype=torch.bfloat16, chunk_tokens=12
    )
    assert [region.pattern for region in report.regions] == ["experts"]


def refusal(form):
    gm = captured(model(form), *inputs())
    before = text(gm)
    after, report = rewritten(gm)
    assert after is gm
    assert text(gm) == before
    assert not report.regions
    return next(entry for entry in report.refusals if entry.pattern == "experts")


def test_largest_key_first():
    def descending(x, weights, experts, up, down):
        order = experts.view(-1).argsort(descending=True)
        ends = ends_of_groups(experts.view(-1), up.shape[0])
        rows = grouped(gated(grouped(x[order // K], up, ends)), down, ends)
        return torch.zeros_like(x).index_add(0, order // K, rows)

    refused = refusal(descending)
    assert (refused.reason, "the largest first" in refused.text) == ("AXIS_MIXED", True)


def test_groups_of_other_keys():
    def others(x, weights, experts, up, down):
        order = experts.view(-1).argsort()
        ends = ends_of_groups(up.shape[0] - 1 - experts.view(-1), up.shape[0])
        rows = grouped(gated(grouped(x[order // K], up, ends)), down, ends)
        return torch.zeros_like(x).index_add(0, order // K, rows)

    assert refusal(others).reason == "AXIS_MIXED"


def test_rows_that_stay_sorted():
    def unsorted(x, weights, experts, up, down):
        order = experts.view(-1).argsort()
        ends = ends_of_groups(experts.view(-1), up.shape[0])
        return grouped(gated(grouped(x[order // K], up, ends)), down, ends).view(-1, K, x.shape[1]).sum(1)

    refused = refusal(unsorted)
    assert (refused.reason, "sorted rows for rows in their own order" in refused.text) == ("AXIS_MIXED", True)


def test_arithmetic_on_positions():
    def shifted(x, weights, experts, up, down):
        order = (experts.view(-1).argsort() + 1) % experts.numel()
        ends = ends_of_groups(experts.view(-1), up.shape[0])
        rows = grouped(gated(grouped(x[order // K], up, ends)), down, ends)
        return torch.zeros_like(x).index_add(0, order // K, rows)

    refused = refusal(shifted)
    assert (refused.reason, "positions of the split dim" in refused.text) == ("AXIS_MIXED", True)


def test_counts_may_leave():
    def counted(x, weights, experts, up, down):
        order = experts.view(-1).argsort()
        counts = torch.histc(experts.view(-1).float(), up.shape[0], 0, up.shape[0] - 1)
        ends = counts.cumsum(0).to(torch.int32)
        rows = grouped(gated(grouped(x[order // K], up, ends)), down, ends)
        return torch.zeros_like(x).index_add(0, order // K, rows) * counts.max()

    report = assert_as_good_as_eager(
        model(counted), inputs(), step=lambda m, *args: m(*args).square().sum(), dtype=torch.bfloat16, chunk_tokens=7
    )
    assert [region.chunks for region in report.regions] == [4]


class Chosen(Experts):
    """The router's own choice, as in a model: the number of tokens and of choices is one size."""

    def forward(self, x_ND):
        weights_NK, experts_NK = self.router(x_ND).softmax(-1).topk(K)
        return self.mix(x_ND, weights_NK, experts_NK, self.up, self.down)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_compile_serves_all_lengths(form):
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixture = Chosen(form).bfloat16()
    compiled, before = looped(mixture, dynamic=True), len(mst_fx.reports())
    for length in (40, 24, 37, 5):
        x = tokens(length, D).bfloat16()
        eager, ours = (gradients(mixture, lambda x, fn=fn: fn(x).square().sum(), [x]) for fn in (mixture, compiled))
        for name, value in eager.items():
            assert relative_error(ours[name], value) < 2e-2, (name, length)
    (report,) = mst_fx.reports()[before:]
    assert [region.pattern for region in report.regions] == ["experts"]


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_shapes_that_depend_on_the_data():
    def one_by_one(x, weights, experts, up, down):
        result = torch.zeros_like(x)
        for e in range(up.shape[0]):
            token, slot = torch.where(experts == e)
            share = gated(x[token] @ up[e]) @ down[e]
            result = result.index_add(0, token, share * weights[token, slot, None])
        return result

    _, report = rewritten(captured(model(one_by_one), *inputs()))
    assert not report.regions
    assert {entry.reason for entry in report.refusals} == {"DATA_DEPENDENT"}
    assert "@ up[e]" in report.refusals[0].source


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_routed_rows_are_never_whole(form):
    n, d, f, e = 512, 32, 128, 4
    m = model(form, d=d, f=f, e=e)
    m = m if form in GROUPED else m.float()
    x = (torch.randn(n, d) * 0.1).to(m.up.dtype).requires_grad_()
    known = [x, *m.parameters()]
    routed_bytes = n * (e if form in DENSE[1:] else K) * f * x.element_size()
    torch._dynamo.reset()
    compiled, unlooped = looped(m, chunk_tokens=32), torch.compile(m, backend="aot_eager")
    copied = m.up.numel() * m.up.element_size() if form is einsum else 0  # with its dims in another order
    small = n * (K + e) * 16 + copied  # the choice, the scores
    assert saved_bytes(lambda: compiled(x, routed(n)), known) <= small < routed_bytes
    assert saved_bytes(lambda: unlooped(x, routed(n)), known) >= 2 * routed_bytes
    upstream = torch.ones(n, d, dtype=x.dtype)
    peak = peak_bytes(lambda: compiled(x, routed(n)).backward(upstream))
    assert peak < peak_bytes(lambda: unlooped(x, routed(n)).backward(upstream)) / 2


def counted_by_mask(keys, groups):
    return torch.zeros(keys.shape[0], groups, dtype=torch.bool).scatter_(-1, keys, True).sum(0)


COUNTS = {
    "one_hot": lambda keys, groups: F.one_hot(keys, groups).sum((0, 1)),
    "one_hot, flat": lambda keys, groups: F.one_hot(keys.flatten(), groups).float().sum(0),
    "one_hot, dim by dim": lambda keys, groups: F.one_hot(keys, groups).sum(1).sum(0),
    "one_hot, tokens first": lambda keys, groups: F.one_hot(keys, groups).sum(0).float().sum(0),
    "one_hot, dims merged and moved": lambda keys, groups: F.one_hot(keys, groups).view(-1, groups).t().sum(1),
    "mask": counted_by_mask,
    "mask of integers": lambda keys, groups: keys.new_zeros((keys.shape[0], groups)).scatter_(1, keys, 1).sum(0),
    "comparison": lambda keys, groups: (keys.flatten()[:, None] == torch.arange(groups)).sum(0),
    "comparison, groups first": lambda keys, groups: (keys.flatten() == torch.arange(groups)[:, None]).sum(1),
    "a mask to add to": lambda keys, groups: (
        torch.zeros(keys.shape[0], groups).scatter_add_(1, keys, torch.ones(keys.shape)).sum(0)
    ),
    "one by one": lambda keys, groups: torch.stack([(keys == e).sum() for e in range(groups)]),
    "scatter_reduce": lambda keys, groups: torch.zeros(groups, dtype=torch.long).scatter_reduce(
        0, *ones_at(keys), "sum"
    ),
    "scatter_add": lambda keys, groups: torch.zeros(groups, dtype=torch.long).scatter_add_(0, *ones_at(keys)),
    "index_add": lambda keys, groups: torch.zeros(groups, dtype=torch.long).index_add_(0, *ones_at(keys)),
    "index_add of ones made apart": lambda keys, groups: torch.zeros(groups, dtype=torch.long).index_add_(
        0, keys.flatten(), torch.ones(keys.numel(), dtype=torch.long)
    ),
    "index_put": lambda keys, groups: torch.zeros(groups, dtype=torch.long).index_put_(
        (keys.flatten(),), ones_at(keys)[1], accumulate=True
    ),
}
"""How many rows go to each group, in other ways than `histc`."""


def ones_at(keys):
    return keys.flatten(), torch.ones_like(keys.flatten())


def by_counts(count, pick, counter=None):
    def layer(x, router, up, down):
        scores, keys = pick(F.linear(x, router).softmax(-1))
        permutation = keys.flatten().argsort(stable=True)
        counts = count(keys, router.shape[0])
        if counter is not None:
            with torch.no_grad():
                counter.add_(counts)
        ends = counts.cumsum(0).to(torch.int32)
        rows = F.silu(torch._grouped_mm(x[permutation // K].bfloat16(), up.bfloat16(), offs=ends))
        out = torch._grouped_mm(rows, down.bfloat16(), offs=ends).float() * scores.flatten()[permutation, None]
        return torch.zeros_like(x).index_add(0, permutation // K, out)

    return layer


def of_top_k(scores):
    return scores.topk(K, -1)


IN_ALL_WAYS = [(name, None) for name in COUNTS] + [
    ("one_hot", True),
    ("mask", True),
    ("index_add of ones made apart", True),
]


@pytest.mark.parametrize(("name", "dynamic"), IN_ALL_WAYS, ids=str)
def test_groups_may_be_counted_in_any_way(name, dynamic):
    count = COUNTS[name]
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    shapes = (N, D), (4, D), (4, D, 4 * D), (4, 4 * D, D)
    x, *weights = (torch.randn(shape, generator=generator) for shape in shapes)
    given = [x.requires_grad_(), *map(torch.nn.Parameter, weights)]
    results, counters = [], []
    for compiled in (False, True):
        counters.append(torch.zeros(4))
        layer = by_counts(count, of_top_k, counters[-1])
        options = {"min_bytes": 0, "num_chunks": 3, "strict": True, "inner": "eager"}
        layer = torch.compile(layer, backend="mst_fx", options=options, dynamic=dynamic) if compiled else layer
        y = layer(*given)
        results.append((y, *torch.autograd.grad(y.square().sum(), given)))
    (region,) = mst_fx.reports()[-1].regions
    assert region.pattern == "experts"
    assert torch.equal(*counters)
    for ours, eager in zip(*results, strict=True):
        assert relative_error(ours, eager) < 0.02  # of bfloat16


def test_a_mask_does_not_count_keys_that_may_stand_twice_in_a_row():
    """It says where the groups end only if no row has one key twice; nobody knows that of rounded scores."""

    def of_rounded_scores(scores):
        return scores[:, :K], (scores[:, :K] * 4).long().clamp(max=3)

    shapes = (N, D), (4, D), (4, D, 4 * D), (4, 4 * D, D)
    gm = captured(by_counts(counted_by_mask, of_rounded_scores), *(torch.randn(shape) for shape in shapes))
    _, report = rewritten(gm)
    assert not report.regions
    assert any("groups that are not those of its rows" in refusal.text for refusal in report.refusals)


def by_bincount(keys, groups):
    return torch.bincount(keys.flatten(), minlength=groups)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_counts_of_which_the_data_say_how_many_there_are():
    shapes = (N, D), (4, D), (4, D, 4 * D), (4, 4 * D, D)
    _, report = rewritten(captured(by_counts(by_bincount, of_top_k), *map(torch.randn, shapes)))
    assert not report.regions
    (refused,) = report.refusals
    assert (refused.reason, "as many values as the data say" in refused.text) == ("DATA_DEPENDENT", True)
    assert "torch.bincount" in refused.source
    assert "histc" in refused.advice


def by_capacity(x, router, up, down):
    """Each expert has places for a few tokens; one-hot matrices say which token is where."""
    scores, keys = F.linear(x, router).softmax(-1).max(-1)
    chosen = F.one_hot(keys, router.shape[0])
    place = (chosen.cumsum(0) * chosen).sum(-1) - 1
    kept = (chosen * (place < CAPACITY)[:, None]).to(x.dtype)
    dispatch = kept[:, :, None] * F.one_hot(place.clamp(max=CAPACITY - 1), CAPACITY).to(x.dtype)[:, None]
    rows = torch.einsum("nec,nd->ecd", dispatch, x)
    out = torch.einsum("ecf,efd->ecd", F.relu(torch.einsum("ecd,edf->ecf", rows, up)), down)
    return torch.einsum("nec,ecd->nd", dispatch * scores[:, None, None], out)


def by_choice_of_experts(x, router, up, down):
    """Each expert takes the tokens that suit it best."""
    scores, tokens = F.linear(x, router).softmax(-1).t().topk(CAPACITY, -1)
    out = torch.bmm(F.gelu(torch.bmm(x[tokens], up)), down) * scores[..., None]
    return torch.zeros_like(x).index_add(0, tokens.flatten(), out.flatten(0, 1))


CAPACITY = 12


@pytest.mark.parametrize("mixture", [by_capacity, by_choice_of_experts])
def test_places_at_experts_are_apart_where_tokens_are_not(mixture):
    torch.manual_seed(0)
    shapes = (4, D), (4, D, 4 * D), (4, 4 * D, D)
    weights = [nn.Parameter(torch.randn(shape) / 2) for shape in shapes]
    report = assert_as_good_as_eager(
        Mixture(mixture, *weights), [tokens()], step=lambda m, x: m(x).square().sum(), chunk_tokens=20
    )
    (region,) = report.regions
    assert (region.pattern, region.axis, region.chunks) == ("experts", "dim 1 (12 positions)", 3)


class Mixture(nn.Module):
    def __init__(self, mixture, router, up, down):
        super().__init__()
        self.mixture, self.router, self.up, self.down = mixture, router, up, down

    def forward(self, x):
        return self.mixture(x, self.router, self.up, self.down)


def test_a_write_to_sorted_keys_that_nobody_reads_again():
    """As a clamp of the experts' numbers, for biases that a layer may have, or may not."""

    def layer(x, router, up, down):
        scores, keys = of_top_k(F.linear(x, router).softmax(-1))
        sorted_keys, permutation = keys.flatten().sort()
        ends = torch.histc(sorted_keys.float(), 4, 0, 3).cumsum(0).to(torch.int32)
        sorted_keys.clamp_(max=3)
        rows = F.silu(torch._grouped_mm(x[permutation // K].bfloat16(), up.bfloat16(), offs=ends))
        out = torch._grouped_mm(rows, down.bfloat16(), offs=ends).float() * scores.flatten()[permutation, None]
        return torch.zeros_like(x).index_add(0, permutation // K, out)

    gm = captured(layer, *(torch.randn(shape) for shape in ((N, D), (4, D), (4, D, 4 * D), (4, 4 * D, D))))
    _, report = rewritten(gm)
    assert [region.pattern for region in report.regions] == ["experts"]
