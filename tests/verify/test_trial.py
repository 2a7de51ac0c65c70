"""Runs of a region: in the modes of its nodes, in float64 whatever it names, with the same random numbers, and back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, region_of, sketched
from torch.fx import GraphModule
from torch.testing._internal.distributed.fake_pg import FakeStore

import mst_fx
from mst_fx.bodies.work import analysed
from mst_fx.verify.excerpt import excerpt
from mst_fx.verify.trial import InFloat64, as_captured, as_looped, isolated, outcomes

T, D, V = 6, 4, 8


def of(fn, *inputs, capture=sketched):
    region, config = region_of(capture(fn, *inputs)), mst_fx.Config()
    return excerpt(region, analysed(region, config, {}), config)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def test_a_region_runs_as_it_was_captured():
    def program(x, w):
        wide = x @ w
        with torch.no_grad():
            scale = wide.abs().amax(-1, keepdim=True)
        total = (wide / scale).sum()
        with torch.autocast("cpu", torch.bfloat16):
            return total, wide @ w.t()

    x, w = leaf(T, D), leaf(D, V)
    run = as_captured(of(program, x, w, capture=captured))
    ours, theirs = run(x, w), program(x, w)
    assert [y.dtype for y in ours] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(ours, list(theirs))
    torch.testing.assert_close(*(torch.autograd.grad(y[0], (x, w), retain_graph=True) for y in (ours, theirs)))
    with torch.no_grad():
        assert not any(y.requires_grad for y in run(x, w))


def test_random_numbers_are_those_of_the_loop():
    """And of every run: a generator of ours draws the seed."""
    x = leaf(T, D)
    found = of(lambda x: F.dropout(x, 0.5) * 2, x)
    state = torch.get_rng_state()
    (once,), (again,) = as_captured(found)(x), as_captured(found)(x)
    (looped,) = as_looped(GraphModule({}, found.work.stages.graph))(x)
    assert torch.equal(once, again)
    assert torch.equal(once, looped)
    assert 0 < (once == 0).sum() < T * D
    assert torch.equal(torch.get_rng_state(), state)


def test_every_op_runs_in_float64_whatever_it_names():
    x = torch.randn(T, D, dtype=torch.float64)
    with InFloat64():
        y = x.float().bfloat16().exp() + torch.zeros(D, dtype=torch.float16) + torch.ones(T, 1)
        assert (x > 0).dtype == torch.bool
        assert x.long().dtype == torch.int64
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, x.exp() + 1, rtol=0, atol=1e-15)


def test_an_op_without_a_float64_form_runs_in_float32():
    lib = torch.library.custom_op("tests_of_trial::single", _single, mutates_args=())
    x = torch.randn(T, D, dtype=torch.float64)
    with InFloat64():
        y = lib(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, x.float().double() * 2)


def _single(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise RuntimeError("float32 only")
    return x * 2


def _unwritten(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.dtype == torch.float32 else torch.full_like(x, 1e200)


def test_an_op_of_another_library_is_not_trusted_with_float64():
    lib = torch.library.custom_op("tests_of_trial::unwritten", _unwritten, mutates_args=())
    x = torch.randn(T, D, dtype=torch.float64)
    with InFloat64():
        y = lib(x)
    assert torch.equal(y, x.float().double() * 2)


def _write(x: torch.Tensor) -> None:
    x.add_(1)
    if x.dtype != torch.float32:
        raise RuntimeError("float32 only")


def test_what_has_no_meaning_in_float64_is_an_error():
    x = torch.randn(T, D, dtype=torch.float64)
    with InFloat64(), pytest.raises(NotImplementedError, match="bits of a float"):
        x.view(torch.int64)
    write = torch.library.custom_op("tests_of_trial::write", _write, mutates_args=["x"])
    with InFloat64(), pytest.raises(RuntimeError, match="float32 only"):
        write(x)  # not once more in float32: it may have written


def test_an_outcome_has_outputs_and_gradients_on_the_cpu_in_float64():
    x, w, labels = leaf(T, D, dtype=torch.bfloat16), leaf(D, V, dtype=torch.bfloat16), torch.arange(T)

    def program(x, w, labels):
        return x @ w, (x @ w).argmax(-1) + labels

    (outcome,) = outcomes(program, [x, w, labels], [torch.ones(T, V), None])
    assert [value.dtype for value in outcome.all] == [torch.float64, torch.int64, torch.float64, torch.float64]
    assert outcome.likes == (
        ((T, V), torch.bfloat16),
        ((T,), torch.int64),
        ((T, D), torch.bfloat16),
        ((D, V), torch.bfloat16),
    )
    expected = torch.autograd.grad((x @ w).sum(), (x, w))
    assert all(torch.equal(a, b.double()) for a, b in zip(outcome.gradients, expected, strict=True))


def test_gradients_that_do_not_exist_are_zeros():
    x, w = leaf(T, D), leaf(D, V)
    (outcome,) = outcomes(lambda x, w: [x.exp(), (x @ w).detach()], [x, w], [torch.ones(T, D), torch.ones(T, V)])
    assert torch.equal(outcome.gradients[1], torch.zeros(D, V, dtype=torch.float64))
    (without,) = outcomes(lambda x, w: [x @ w], [x, w], [None])
    assert [value.count_nonzero() for value in without.gradients] == [0, 0]


def test_the_second_run_back_has_gradients_of_another_layout():
    seen = []

    def program(x):
        y = x * 2
        y.register_hook(lambda grad: seen.append(grad.stride()))
        return [y]

    x, upstream = leaf(T, D), torch.randn(T, D)
    one, other = outcomes(program, [x], [upstream], layouts=2)
    assert seen == [(D, 1), (1, T)]
    assert torch.equal(one.gradients[0], other.gradients[0])
    assert torch.equal(one.gradients[0], upstream.double() * 2)


def test_without_leaves_nothing_is_recorded():
    recorded = []
    run = lambda x: recorded.append(torch.is_grad_enabled()) or [x]  # noqa: E731
    for x in (torch.ones(2), leaf(2)):
        assert len(outcomes(run, [x], [torch.ones(2)], layouts=2)) == (2 if x.requires_grad else 1)
    assert recorded == [False, True]


def test_runs_are_hidden_from_hooks_and_no_grad_around_the_compile():
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with isolated():
            (outcome,) = outcomes(lambda x: [x.exp()], [leaf(T, D)], [torch.ones(T, D)])
        assert not torch.is_grad_enabled()
    assert saved == []
    assert outcome.gradients[0].count_nonzero() == T * D


def test_no_rank_waits_for_another():
    """Collectives are run as if all ranks held the same."""
    x, collectives = torch.randn(2, 3), torch.ops._c10d_functional
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with isolated():
            assert torch.equal(collectives.wait_tensor(collectives.all_reduce(x, "sum", "0")), 2 * x)
            assert torch.equal(collectives.all_reduce(x, "max", "0"), x)
            assert torch.equal(collectives.all_gather_into_tensor(x, 2, "0"), torch.cat([x, x]))
            assert torch.equal(collectives.reduce_scatter_tensor(x, "avg", 2, "0"), x[:1])
            with pytest.raises(NotImplementedError, match="communicates"):
                collectives.broadcast(x, 0, "0")
    finally:
        torch.distributed.destroy_process_group()
