"""Ints and lengths that vary as arguments of ops: operands where an op takes tensors, fixed where it needs a number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf, looped_regions
from fuzzing.harness import indices, weight


def of_a_number(k):
    """Tokens, two weights that do not vary, and an int."""
    return leaf(2, 5, 3), weight(3, 8), weight(8, 3), 2 + k


def of_a_length(k):
    return leaf(2, 5 + k, 3), weight(3, 8), weight(8, 3)


def clamps(h, n):
    return h.clamp(-1, n) + h.clamp(-n, 1.5) + h.clamp_min(n - 3.5) + h.clamp(max=max(n, 3))


def alphas(h, n):
    return torch.add(h, h.tanh(), alpha=n) - torch.sub(h.tanh(), h, alpha=n) + (h - n)


def powers(h, n):
    return h.pow(n) + n ** h.tanh() + float(n) ** 0.5 * h


def quotients(h, n):
    return h / n + h % n + torch.fmod(h, n) + h.detach() // n + n // 2


def choices(h, n):
    return h.masked_fill(h > 0.3 * n, n) + torch.where(h > n - 2, h, n) + h * (h < n) + h * (h != n)


def fills(h, n):
    filled = torch.full_like(h, n) + torch.full((8,), n, dtype=h.dtype) + h.new_full((h.shape[1], 8), n)
    return h * filled + torch.empty_like(h).fill_(n)


def positions(h, n):
    return h * (torch.arange(8) < n) + h * (torch.arange(8) * n % 7) + h * torch.scalar_tensor(n, dtype=h.dtype)


def interpolated(h, n):
    return torch.lerp(h, h.tanh(), n / 7) + torch.addcdiv(h, h, h.exp(), value=n)


TENSOR_FORMS = [clamps, alphas, powers, quotients, choices, fills, positions, interpolated]


@pytest.mark.parametrize("form", TENSOR_FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("of", [of_a_number, of_a_length], ids=["int", "length"])
def test_an_int_is_an_operand_where_an_op_takes_tensors(of, form):
    def mlp(x, up, down, n=None):
        return form(x @ up, x.shape[1] - 3 if n is None else n) @ down

    reports = beside_eager(mlp, of, 2, dynamic=True)
    fixes = form is powers and torch.__version__ < "2.13"  # Dynamo itself: an exponent
    assert len(reports) == 1 or fixes
    assert looped_regions(reports) == 1


def softplus(h, n):
    return F.softplus(h, n)


def hardtanh(h, n):
    return F.hardtanh(h, -n, n)


def addcmul(h, n):
    return torch.addcmul(h, h, h, value=n)


def topk(h, n):
    return h * (h >= h.topk(n, -1).values[..., -1:])


def roll(h, n):
    return h.tanh().roll((n,), (-1,))


def slice(h, n):
    return torch.cat([h[..., n:], 2 * h[..., :n]], -1)


def constant_pad_nd(h, n):
    return h * F.pad(h, (0, n)).amax(-1, keepdim=True)


def repeat(h, n):
    return h.repeat(1, 1, n).unflatten(-1, (n, 8)).sum(-2)


NUMBERS_ONLY = [softplus, hardtanh, addcmul, topk, roll, slice, constant_pad_nd, repeat]


@pytest.mark.parametrize("form", NUMBERS_ONLY, ids=lambda form: form.__name__)
def test_an_int_is_fixed_where_an_op_takes_none(form):
    """A guard holds it: another value is another compile, and the first one comes back to its own."""
    reports = beside_eager(lambda x, up, down, n: form(x @ up, n) @ down, lambda k: of_a_number(k % 2), 3, dynamic=True)
    assert [len(report.regions) for report in reports] == [1, 1]


@pytest.mark.parametrize("form", NUMBERS_ONLY, ids=lambda form: form.__name__)
def test_the_length_is_not_fixed_for_an_op_that_takes_none(form):
    reports = beside_eager(lambda x, up, down: form(x @ up, x.shape[1] - 3) @ down, of_a_length, 2, dynamic=True)
    ((refused,),) = [report.refusals for report in reports]
    assert refused.reason == "NUMBER"
    assert refused.text.startswith(f"aten.{form.__name__}.")
    assert refused.text.endswith("takes a number that varies with the length")
    assert refused.source.split(":")[1] == str(form.__code__.co_firstlineno + 1)


def small(x, up, down, n):
    return topk(x @ up, n) @ down


def mixed(x, up, down, n):
    return topk(x @ up, n).cumsum(1).square().cumsum(1) @ down


@pytest.mark.parametrize(("mlp", "options"), [(small, {"min_bytes": 1 << 30}), (mixed, {})], ids=["small", "mixed"])
def test_a_region_that_is_left_alone_fixes_no_number(mlp, options):
    (report,) = beside_eager(mlp, of_a_number, 3, dynamic=True, **options)
    assert not report.regions
    assert report.refusals


def cross_entropy(x, head, y, **how):
    return F.cross_entropy((x @ head).flatten(0, 1), y.flatten(), **how)


def smoothed(x, head, y, n):
    return cross_entropy(x, head, y, label_smoothing=n / 20)


def ignoring(x, head, y, n):
    return cross_entropy(x, head, y, ignore_index=n)


def divided(x, head, y, n):
    return cross_entropy(x, head, y, reduction="sum") / n


def capped(x, head, y, n):
    return F.cross_entropy((n * torch.tanh(x @ head / n)).flatten(0, 1), y.flatten())


def cut(x, head, y, n):
    return F.cross_entropy((x @ head)[:, n:].flatten(0, 1), y[:, n:].flatten())


@pytest.mark.parametrize(
    ("loss", "compiles"),
    [(smoothed, 2), (ignoring, 2), (divided, 1), (capped, 1), (cut, 1)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_numbers_of_a_loss(loss, compiles):
    def given(k):
        return leaf(2, 6, 3), weight(3, 9), indices(9, 2, 6), 2 + k

    reports = beside_eager(loss, given, 2, dynamic=True)
    assert len(reports) == compiles
    assert looped_regions(reports) == 1
