"""Products of groups of rows add up in place, in every way; the kernel on a GPU, and in Triton's interpreter.

Legend: n rows, i and j columns, g groups.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_fx.runtime import products
from mst_fx.runtime.products import add_grouped_product, all_groups_at_once, group_by_group, grouped_product

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = {F32: 2e-7, BF16: 2**-8, F16: 2**-11}
"""Relative errors of one rounding, or of a sum in float32."""
RAGGED = ([0, 5, 0, 0, 37, 1, 64, 0], 40, 72)
"""Rows of the groups, i and j: groups without rows, first, last and in between, and sizes that no tile divides."""
FULL = ([128, 384], 128, 256)


def check(way, dtype, sum_dtype, sizes=RAGGED, device="cpu", *, transposed=False):
    """Compare with float64 what is written and then added to, in the dtype of the sum; NaN in rows of no group."""
    rows, i, j = sizes
    generator = torch.Generator().manual_seed(i)
    ends = torch.tensor(rows).cumsum(0).to(torch.int32)
    a, b = (torch.randn(int(ends[-1]) + 3, width, generator=generator).to(dtype) for width in (i, j))
    a[-3:], b[-3:] = torch.nan, torch.inf
    a, b = (x.t().contiguous().t() if transposed else x for x in (a, b))
    total = torch.full((len(rows), i, j), torch.nan, dtype=sum_dtype, device=device)
    starts = [0, *ends.tolist()[:-1]]
    pairs = [(a[s:e].double(), b[s:e].double()) for s, e in zip(starts, ends.tolist(), strict=True)]
    exact = torch.stack([x.t() @ y for x, y in pairs])
    for times in (1, 2):
        way(total, a.to(device), b.to(device), ends.to(device), times == 2)
        error = (total.cpu().double() - times * exact).norm() / exact.norm()
        assert error <= times * (EPS[sum_dtype] if way.__class__.__name__ == "GroupedKernel" else EPS[dtype])


@pytest.mark.parametrize(("dtype", "sum_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)])
@pytest.mark.parametrize("way", [group_by_group, all_groups_at_once], ids=lambda way: way.__name__)
def test_ways_without_a_kernel(way, dtype, sum_dtype):
    check(way, dtype, sum_dtype)


class Recorded:
    """A way that only tells how it was called."""

    def __init__(self):
        self.adds = []

    def __call__(self, total, a, b, ends, adds):
        self.adds.append((tuple(total.shape), total.dtype, adds))


def test_the_first_product_is_written_and_the_others_are_added(monkeypatch):
    way = Recorded()
    monkeypatch.setattr(products, "_way_for", lambda a, dtype: way)
    a, b, ends = torch.ones(4, 2, dtype=BF16), torch.ones(4, 3, dtype=BF16), torch.tensor([1, 4], dtype=torch.int32)
    total = grouped_product(a, b, ends, F32)
    add_grouped_product(total, a, b, ends)
    assert way.adds == [((2, 2, 3), F32, False), ((2, 2, 3), F32, True)]


def test_the_way_is_that_of_the_device(monkeypatch):
    """Tensors of a mode get no kernel, and no value of theirs is read."""
    monkeypatch.setattr(products, "has_kernel", lambda: True)
    x = torch.ones(2, 2)
    assert products._way_for(x, F32) is group_by_group
    assert products._way_for(x.to("meta"), F32) is all_groups_at_once
    with FakeTensorMode() as mode:
        assert products._way_for(mode.from_tensor(x), F32) is all_groups_at_once
        assert products._way_for(torch.empty(2, 2, device="cuda"), F32) is all_groups_at_once


@pytest.mark.parametrize(
    ("device", "kernel", "made"), [("cpu", True, 1), ("meta", False, 0), ("cuda", True, 0), ("cuda", False, 8)]
)
def test_products_that_are_made_before_they_are_added(monkeypatch, device, kernel, made):
    monkeypatch.setattr(products, "has_kernel", lambda: kernel)
    assert products.groups_made_at_once(torch.device(device), 8) == made


def test_the_first_kernel_that_runs_is_taken(monkeypatch, caplog):
    def failing(*args):
        raise ValueError("too small")

    def tried(*kernels):
        products._tried.cache_clear()
        module = SimpleNamespace(kernels_for=lambda device, dtype: kernels)
        monkeypatch.setitem(sys.modules, "mst_fx.runtime.grouped_kernel", module)
        return products._tried(torch.device("cpu"), F32, F32)

    one, another = Recorded(), Recorded()
    assert tried(failing, one, another) is one
    assert [adds for _, _, adds in one.adds] == [False, True]
    assert not caplog.text
    assert tried() is all_groups_at_once  # a dtype that has none
    assert not caplog.text
    assert tried(failing) is all_groups_at_once
    assert "does not run: too small" in caplog.text
    products._tried.cache_clear()


@pytest.fixture
def interpreted(monkeypatch):
    """The module of the kernel, run by Triton's interpreter."""
    pytest.importorskip("triton", minversion="3.9")  # the interpreter of 3.6 fails with NumPy 2.4
    from mst_fx.runtime import grouped_kernel

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield importlib.reload(grouped_kernel)
    monkeypatch.delenv("TRITON_INTERPRET")
    importlib.reload(grouped_kernel)


@pytest.mark.parametrize(("dtype", "sum_dtype"), [(F32, F32), (F16, F32), (F16, F16)])  # it multiplies no bfloat16
def test_the_kernel_in_the_interpreter(interpreted, dtype, sum_dtype):
    for tiles in ((32, 64, 16, 4, 1), (32, 64, 16, 4, 1, False)):
        kernel = interpreted.GroupedKernel(*tiles)
        check(kernel, dtype, sum_dtype)
        check(kernel, dtype, sum_dtype, FULL, transposed=True)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@GPU
def test_batches_add_up_without_a_rounding_in_between():
    a, b = (torch.randn(3, 32, 64, device="cuda", dtype=BF16) for _ in range(2))
    total = products.product(a.mT, b, F32)
    products.add_product(total, a.mT, b)
    assert (total.double() - 2 * (a.double().mT @ b.double())).abs().max() < 1e-4


@GPU
@pytest.mark.parametrize(("dtype", "sum_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)])
def test_every_kernel_of_a_gpu(dtype, sum_dtype):
    from triton.runtime.errors import OutOfResources

    from mst_fx.runtime.grouped_kernel import kernels_for

    device, ran = torch.device("cuda"), []
    for kernel in kernels_for(device, dtype):
        with suppress(OutOfResources):  # shared memory: the next kernel takes less
            check(kernel, dtype, sum_dtype, device="cuda")
            check(kernel, dtype, sum_dtype, FULL, device="cuda", transposed=True)
            check(kernel, dtype, sum_dtype, ([3000, 0, 1000, 96], 288, 768), device="cuda")
            ran.append(kernel)
    assert products._tried(device, dtype, sum_dtype) is ran[0]
