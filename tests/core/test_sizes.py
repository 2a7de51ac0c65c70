"""Sizes that are only known at run time: what is known of them, and that asking adds no guard."""

from __future__ import annotations

import pytest
import sympy
import torch
from symbols import varying
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mst_fx.core import sizes
from mst_fx.core.sizes import LONG, UNSEEN


@pytest.fixture
def env():
    """A test that takes it may add no guard, unless it empties the list."""
    shape_env = ShapeEnv()
    yield shape_env
    assert [str(guard.expr) for guard in shape_env.guards] == []


@pytest.fixture
def n(env):
    return varying(env, 8)


@pytest.fixture
def of_the_data(env):
    return env.create_unbacked_symint()


def test_a_hint_is_the_captured_value(n, of_the_data):
    assert [sizes.hint(size) for size in (5, n, 2 * n + 1, n - n + 3)] == [5, 8, 17, 3]
    assert sizes.hint(of_the_data) == UNSEEN


def test_a_hint_is_what_the_caller_names():
    x, seen = torch.zeros(8), []
    torch._dynamo.mark_dynamic(x, 0, hint_override=1000)
    torch.compile(lambda x: x + 1, backend=lambda gm, given: seen.extend(given) or gm)(x)
    assert [sizes.hint(size) for size in seen if isinstance(size, torch.SymInt)] == [1000]


def test_a_long_hint_is_long_for_each_symbol(env, n, of_the_data):
    longer = varying(env, 2 * LONG)
    assert [sizes.long_hint(size) for size in (5, n, 2 * n + 1)] == [5, LONG, 2 * LONG + 1]
    assert [sizes.long_hint(size) for size in (longer, longer + n)] == [2 * LONG, 3 * LONG]
    assert sizes.long_hint(of_the_data) == UNSEEN


def test_a_long_hint_is_no_longer_than_the_size_can_be(env, n):
    env.constrain_symbol_range(n.node.expr, compiler_min=2, compiler_max=100)
    assert sizes.long_hint(3 * n) == 300


def test_a_number_stands_where_all_symbols_cancel(n):
    for size, number in ((7, 7), (n - n + 3, 3), (2 * n // n, 2), (n, None), (n % 2, None)):
        assert sizes.number(size) == number
        assert sizes.is_symbolic(size) == (number is None)


def test_what_is_a_size(n):
    given = [8, n, 0.5, True, (n, [2, n]), [], torch.ones(()), [n, torch.ones(())], None]
    assert [sizes.is_size(value) for value in given] == [True] * 6 + [False] * 3


def test_what_depends_on_the_data(env, n, of_the_data):
    given = [8, n, varying(env, 0.5), of_the_data, of_the_data + n, of_the_data > 3]
    assert [sizes.depends_on_data(number) for number in given] == [False] * 3 + [True] * 3


def test_sure_is_what_holds_for_all_values(env, n):
    other = varying(env, 8)
    assert all(map(sizes.sure, [n >= 2, 2 * n == n + n, (4 * n) % n == 0, 3 == 3]))
    assert not any(map(sizes.sure, [n == 8, n != 8, n == other, n % 2 == 0]))


def test_symbols_and_their_captured_values(env, n):
    other = varying(env, 5)
    symbols = {n.node.expr: 8, other.node.expr: 5}
    assert sizes.seen_symbols(n * other + n) == symbols
    assert sizes.seen_symbols(7) == {}
    assert sizes.expression(n + 1) == n.node.expr + 1
    assert sizes.expression(7) == 7
    alone = sizes.alone(n.node.expr, n * other)
    assert sizes.sure(alone == n)
    assert sizes.hint(alone) == 8


def test_formulas_in_place_of_symbols(env, n):
    other = varying(env, 4)
    known = {n.node.expr: 2 * other.node.expr}
    placed = sizes.in_terms_of(n + 1, known)
    assert sizes.sure(placed == 2 * other + 1)
    assert sizes.hint(placed) == 9
    assert [sizes.in_terms_of(size, known) for size in (other, 7)] == [other, 7]


def test_numbers_in_place_of_symbols(env, n):
    rate = varying(env, 0.5)
    known = {n.node.expr: sympy.Integer(4), rate.node.expr: sympy.Float(0.25)}
    placed = [sizes.in_terms_of(number, known) for number in (n, n * n, rate, n < 3)]
    assert placed == [4, 16, 0.25, False]
    assert [type(number) for number in placed] == [int, int, float, bool]


@pytest.mark.parametrize("captured", [8, 0.5])
def test_a_fixed_number_is_guarded(env, captured):
    number = varying(env, captured)
    symbol = number.node.expr
    sizes.fix(number)
    (guard,) = env.guards
    env.guards.clear()
    assert guard.expr == sympy.Eq(symbol, captured)


def test_the_captured_value_of_a_float(env):
    assert sizes.seen(varying(env, 0.5)) == 0.5
    assert sizes.seen(env.create_unbacked_symfloat()) is None


def test_captured_values_answer_without_a_guard(n):
    with sizes.unguarded():
        assert n == 8
        assert not n > 100


def test_a_guard_is_an_error_where_none_may_be_added(env, n):
    for unrelated in ([], [3], [3, n]):
        with sizes.without_guards(unrelated):
            sizes.sure(n == 8)
    with pytest.raises(AssertionError, match=r"guards were added: .*8"), sizes.without_guards([3, n]):
        bool(n == 8)
    with sizes.without_guards([n]):
        pass  # those in front of the block are not its own
    env.guards.clear()


def test_a_length_of_which_one_fact_is_known(env):
    length = sizes.any_length(env)
    assert sizes.sure(length >= 2)
    assert not any(map(sizes.sure, [length >= 3, length == 2, length % 2 == 0]))
    assert sizes.depends_on_data(length)
    assert not env.pending_fresh_unbacked_symbols  # no trace has to bind it
