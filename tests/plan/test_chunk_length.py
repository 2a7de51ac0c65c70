"""How long a mini-sequence is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mst_fx.core.config import Wish
from mst_fx.plan.chunk_length import default_lengths, longer, shorter, terms_of
from mst_fx.plan.lengths import Terms
from mst_fx.plan.over_tokens import ALIGNMENT, MAX_ROWS, MIN_ROWS, NEAR
from mst_fx.predict.extent import Extent

H, F, V = 4096, 14336, 128256
MLP = Extent(65536, False, 1, widest=2 * F, wide=4 * F, cast=2 * H * F)
HEAD = Extent(65536, False, 1, widest=2 * V, wide=2 * V, cast=2 * H * V)
ODD = replace(HEAD, cast=2 * 3584 * V)  # its float32 sum asks for chunks that divide none of the lengths below


def chunk_of(extent, accumulate="native", *, recomputes=False):
    return default_lengths(extent, Wish(), accumulate, recomputes=recomputes).chunk


@given(st.integers(1, 300_000), st.sampled_from([MLP, HEAD]), st.sampled_from(["native", "float32"]))
def test_chunks_are_even_and_aligned(length, extent, accumulate):
    lengths = default_lengths(replace(extent, length=length), Wish(), accumulate, recomputes=True)
    chunks = -(-length // lengths.chunk)
    assert lengths.chunk * chunks - length < ALIGNMENT * chunks
    assert lengths.chunk % ALIGNMENT == 0 or lengths.chunk == length
    assert lengths.chunk <= lengths.forward <= 2 * lengths.chunk


@pytest.mark.parametrize("extent", [MLP, HEAD, ODD])
@pytest.mark.parametrize("length", [8192, 12288, 16384, 24576, 131072])
def test_no_chunk_is_ragged_where_a_length_nearby_divides(extent, length):
    for accumulate in ("native", "float32"):
        assert length % chunk_of(replace(extent, length=length), accumulate) == 0


def test_rows_are_enough_for_fast_products_and_no_more():
    assert chunk_of(MLP) == MAX_ROWS
    assert chunk_of(HEAD) == MIN_ROWS
    assert chunk_of(replace(MLP, tokens_per_position=8)) == MAX_ROWS // 8  # of eight sequences
    assert chunk_of(replace(MLP, sharing=16.0)) == MIN_ROWS * 16  # an expert meets a part of the tokens


@pytest.mark.parametrize(("hidden", "classes"), [(4096, 128256), (2048, 151936), (3584, 256000), (8192, 128256)])
def test_chunks_of_a_float32_sum_fill_what_its_cast_will_take(hidden, classes):
    row, cast = 2 * classes, 2 * hidden * classes
    held = row * chunk_of(Extent(65536, False, 1, widest=row, wide=row, cast=cast), "float32")
    assert cast / NEAR / 1.1 <= held <= cast * NEAR


@given(st.integers(1, 300_000), st.sampled_from([MLP, HEAD]))
def test_longer_chunks_are_about_twice_as_long_and_never_the_only_ones(length, extent):
    lengths = default_lengths(replace(extent, length=length), Wish(), "float32", recomputes=True)
    double = longer(Terms(replace(extent, length=length), Wish(), lengths), lengths)
    chunks = -(-length // lengths.chunk)
    if double is None:
        assert chunks <= 2 or length % lengths.chunk == 0
    else:
        assert double.chunk < length
        assert length % double.chunk == 0 or length % lengths.chunk > 0
        assert 1.4 < double.chunk / lengths.chunk < 2 * NEAR + 0.1
        assert double.forward >= max(double.chunk, lengths.forward)


def test_longer_chunks_of_lengths_in_use():
    for length, chunk in ((8192, None), (12288, 6144), (16384, 8192), (20480, None), (65536, 8192), (131072, 8192)):
        extent = replace(MLP, length=length)
        terms = terms_of(extent, Wish(), "float32", recomputes=True)
        double = longer(terms, terms.lengths)
        assert (double and double.chunk) == chunk


@pytest.mark.parametrize("wish", [Wish(chunk_tokens=4096), Wish(num_chunks=16)])
def test_what_the_user_has_fixed_stays(wish):
    lengths = default_lengths(MLP, wish, "float32", recomputes=True)
    assert longer(Terms(MLP, wish, lengths), lengths) is None
    assert shorter(Terms(MLP, wish, lengths), lengths) is None
