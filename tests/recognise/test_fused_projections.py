"""A projection that makes features of several kinds is parted, so that a loop takes those of one kind."""

from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf
from fuzzing.harness import weight
from graphs import captured, rewritten, tensors, text
from memory_probe import saved_bytes
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.core.clean_room import clean_room
from mst_fx.engine import Engine
from mst_fx.recognise.fused_projections import fused_projections
from mst_fx.recognise.pattern import patterns
from mst_fx.recognise.reader import Reader

B, T, D, H = 2, 24, 8, 32  # sequences, tokens, features of the stream, wide features


def attention(qkv):
    q, k, v = (x[:, None] for x in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v)[:, 0]


def in_and_out(x, w_in, w_out):
    qkv, h = F.linear(x, w_in).split([3 * D, H], -1)
    return F.linear(torch.cat([attention(qkv), F.gelu(h)], -1), w_out)


def gated_between_slices(x, w_in, bias, w_out):
    y = x @ w_in.T + bias
    gate, qkv, up = y[..., :H], y[..., H : H + 3 * D], y[..., H + 3 * D :]
    return F.linear(torch.cat([attention(qkv), F.silu(gate) * up], -1), w_out)


def five_pieces(x, w_in, w_out):
    q, k, v, up, gate = F.linear(x, w_in).split([D, D, D, H, H], -1)
    mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    return F.linear(torch.cat([mixed, F.silu(gate) * up], -1), w_out)


def with_an_adapter(x, w_in, a, b, w_out):
    y = F.linear(x, w_in) + 0.5 * F.linear(F.linear(x, a), b)
    qkv, h = y.split([3 * D, H], -1)
    return F.linear(torch.cat([attention(qkv), F.gelu(h)], -1), w_out)


def channels_first(x, w_in, w_out):
    qkv, h = F.conv1d(x.mT, w_in[..., None]).split([3 * D, H], 1)
    mixed = attention(qkv.mT).mT
    return F.conv1d(torch.cat([mixed, F.gelu(h)], 1), w_out[..., None])


def checkpointed(x, w_in, w_out):
    return checkpoint(in_and_out, x, w_in, w_out, use_reentrant=False)


BOTH = ((3 * D + H, D), (D, D + H))
LOOPED = {
    in_and_out: BOTH,
    gated_between_slices: ((3 * D + 2 * H, D), (3 * D + 2 * H,), (D, D + H)),
    five_pieces: ((3 * D + 2 * H, D), (D, D + H)),
    with_an_adapter: (BOTH[0], (2, D), (3 * D + H, 2), BOTH[1]),
    channels_first: BOTH,
    checkpointed: BOTH,
}
"""Programs, and the shapes of their weights."""


@pytest.mark.parametrize("varies", [False, True], ids=["fixed", "varies"])
@pytest.mark.parametrize("program", LOOPED, ids=lambda program: program.__name__)
def test_the_wide_features_are_looped(program, varies):
    def given(call):
        x = leaf(B, T + 4 * call, D)
        if varies:
            torch._dynamo.mark_dynamic(x, 1)
        return x, *(weight(*shape, scale=0.4) for shape in LOOPED[program])

    (report,) = beside_eager(program, given, calls=1 + varies)
    assert len(report.regions) == 1, str(report)


def test_nothing_wide_is_saved():
    inputs = [leaf(B, 64, D), *(weight(*shape) for shape in BOTH)]
    fn = torch.compile(in_and_out, backend="mst_fx", options={"min_bytes": 0, "num_chunks": 4, "inner": "aot_eager"})
    plain = torch.compile(in_and_out, backend="aot_eager")
    ours, without = (saved_bytes(lambda f=f: f(*inputs).sum(), inputs) for f in (fn, plain))
    wide = B * 64 * H * 8
    assert (
        ours <= without - 2 * wide + B * 64 * D * 8
    )  # h, and what attention and GELU are joined to; attention's stays


def in_place(x, w_in, w_out):
    y = F.linear(x, w_in)
    qkv, h = y[..., : 3 * D], y[..., 3 * D :]
    h.relu_()
    return F.linear(torch.cat([attention(qkv), h], -1), w_out)


def normed_as_a_whole(x, w_in, w_out):
    qkv, h = F.layer_norm(F.linear(x, w_in), (3 * D + H,)).split([3 * D, H], -1)
    return F.linear(torch.cat([attention(qkv), F.gelu(h)], -1), w_out)


def dropped_as_a_whole(x, w_in, w_out):
    qkv, h = F.dropout(F.linear(x, w_in), 0.1).split([3 * D, H], -1)
    return F.linear(torch.cat([attention(qkv), F.gelu(h)], -1), w_out)


def returned(x, w_in, w_out):
    qkv, h = F.linear(x, w_in).split([3 * D, H], -1)
    return F.linear(torch.cat([attention(qkv), F.gelu(h)], -1), w_out), qkv


def overlapping(x, w_in, w_out):
    y = F.linear(x, w_in)
    return F.linear(torch.cat([attention(y[..., : 3 * D]), F.gelu(y[..., -H - 1 : -1])], -1), w_out)


def read_as_a_whole(x, w_in, w_out):
    y = F.linear(x, w_in)
    qkv, h = y.split([3 * D, H], -1)
    return F.linear(torch.cat([attention(qkv), F.gelu(h)], -1), w_out) + y.cumsum(1).mean()


def tokens_too(x, w_in, w_out):
    y = F.linear(x, w_in)
    qkv, h = y[:, :, : 3 * D], y[:, 1:, 3 * D :]
    return F.linear(torch.cat([attention(qkv)[:, 1:], F.gelu(h)], -1), w_out)


def left_out(x, w_in, w_out):
    y = F.linear(x, w_in)
    h = F.pad(F.gelu(y[..., 3 * D : -1]), (0, 1))
    return F.linear(torch.cat([attention(y[..., : 3 * D]), h], -1), w_out)


def tokens_of_all(x, w_in, w_out):
    y = F.linear(x, w_in)
    qkv, h = y[:, 1:, : 3 * D], y[:, 1:, 3 * D :]
    return F.linear(torch.cat([attention(qkv), F.gelu(h)], -1), w_out)


WHOLE = (
    in_place,
    normed_as_a_whole,
    dropped_as_a_whole,
    returned,
    overlapping,
    read_as_a_whole,
    tokens_too,
    left_out,
)


@pytest.mark.parametrize("program", WHOLE, ids=lambda program: program.__name__)
def test_stays_one_projection(program):
    gm = captured(program, *tensors((B, T, D), *BOTH))
    with clean_room():
        assert not list(fused_projections(Reader(gm), (), strict=True))
    assert text(rewritten(gm)[0]) == text(gm)


def test_pieces_whose_widths_vary_stay_one_projection():
    def program(x, w):
        gate, up = (x.flatten(0, 1) @ w).unflatten(0, (B, x.shape[1])).chunk(2, -1)
        return F.silu(gate) * up

    beside_eager(program, lambda _: [leaf(B, T, D), leaf(D, 2 * H)], dynamic=True)


def test_attention_beside_an_mlp_stays_one_projection():
    def program(x, w_in, w_out, up, down):
        q, k, v = (y[:, None] for y in F.linear(x, w_in).chunk(3, -1))  # each is wide
        mixed = F.linear(F.scaled_dot_product_attention(q, k, v)[:, 0], w_out)
        return F.linear(F.gelu(F.linear(mixed, up)), down)

    gm = captured(program, *tensors((B, T, D), (3 * H, D), (D, H), (H, D), (D, H)))
    module, report = rewritten(gm)
    assert len(report.regions) == 1
    assert "linear(l_x_, l_w_in_)" in text(module)


def test_cut_tokens_go_first():
    gm = captured(tokens_of_all, *tensors((B, T, D), *BOTH))
    with clean_room():
        assert not list(fused_projections(Reader(gm), (), strict=True))


def test_what_no_loop_needs_is_left_over():
    gm = captured(in_and_out, *tensors((B, T, D), *BOTH))
    engine = Engine(gm, mst_fx.Config(min_bytes=0, chunk_tokens=4), patterns())
    assert engine.surveyed.left_over(engine.surveyed.sites) == set()
    assert engine.surveyed.left_over(()) == {(gm, "linear")}
    engine.surveyor.left_alone.add((gm, "linear"))
    again = engine.surveyor.survey(gm)
    assert not again.parted
    assert not again.sites


@pytest.mark.parametrize("options", [{"min_bytes": 1 << 30}, {"memory_budget": 1 << 30}], ids=["small", "fits"])
def test_a_projection_whose_mlp_is_not_looped_stays_one(options):
    gm = captured(in_and_out, *tensors((B, T, D), *BOTH))
    module, report = rewritten(gm, **options)
    assert not report.regions
    assert text(module) == text(gm)


class TestGolden(expecttest.TestCase):
    def test_pieces_side_by_side_share_a_projection(self):
        gm, report = rewritten(captured(five_pieces, *tensors((B, T, D), *LOOPED[five_pieces])))
        assert [region.pattern for region in report.regions] == ["gated_mlp"]
        self.assertExpectedInline(
            text(gm).partition("get_attr")[0],
            """\
placeholder l_x_
placeholder l_w_in_
placeholder l_w_out_
view = reshape.default(l_x_, (48, 8))
split_with_sizes = split_with_sizes.default(l_w_in_, (24, 64))
getitem = getitem(split_with_sizes, 0)
getitem_1 = getitem(split_with_sizes, 1)
t = t.default(getitem)
mm = mm.default(view, t)
view_1 = reshape.default(mm, (2, 24, 24))
split_with_sizes_1 = split_with_sizes.default(view_1, (8, 8, 8), 2)
getitem_2 = getitem(split_with_sizes_1, 0)
getitem_3 = getitem(split_with_sizes_1, 1)
getitem_4 = getitem(split_with_sizes_1, 2)
t_1 = t.default(getitem_1)
getitem_5 = getitem(getitem_2, (slice(None, None, None), None))
getitem_6 = getitem(getitem_3, (slice(None, None, None), None))
getitem_7 = getitem(getitem_4, (slice(None, None, None), None))
scaled_dot_product_attention = scaled_dot_product_attention(getitem_5, getitem_6, getitem_7)
mixed = getitem(scaled_dot_product_attention, (slice(None, None, None), 0))
""",
        )


def test_report_names_what_an_exception_hits(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr("mst_fx.recognise.fused_projections._makers", broken)
    gm = captured(in_and_out, *tensors((B, T, D), *BOTH))
    _, report = rewritten(gm, strict=False)
    (refusal,) = [each for each in report.refusals if each.pattern == "fused"]
    assert "of the test" in refusal.text
