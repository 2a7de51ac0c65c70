"""Values on the host: what a handle stands for, for how long, and what comes back when."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mst_fx.runtime import host_memory, offload_ops, transfers  # noqa: F401 - the ops

ops = torch.ops.mst_fx
CPU = torch.device("cpu")


def sent(x, least=0, new=True):
    order = list(range(x.dim()))
    return ops.on_host(ops.to_host(x, order, new, least), x, x)


def back(handle, dtype=torch.float32):
    return ops.to_device(handle, None, list(range(handle.dim())), dtype, CPU, True)


@pytest.fixture(autouse=True)
def road(monkeypatch):
    """The way of the CPU, fresh for each test."""
    monkeypatch.setattr(transfers, "_roads", {})
    return transfers.road(CPU)


def test_a_value_comes_back_in_its_layout_as_often_as_it_is_asked_for():
    """As a retained graph does. A handle has the value's shape, and is no memory of its size."""
    for x in (torch.randn(4, 6), torch.randn(4, 6, 5).permute(1, 2, 0), torch.randn(3).bfloat16(), torch.randn(0, 2)):
        order = sorted(range(x.dim()), key=lambda dim: -x.stride(dim))
        handle = ops.to_host(x, order, True, 0)
        truth = x.clone()
        x.zero_()
        assert handle.untyped_storage().nbytes() == 1
        for _ in range(2):
            value = ops.to_device(handle, None, order, x.dtype, CPU, True)
            assert torch.equal(value, truth)
            assert value.stride() == x.stride()
            value.zero_()


def test_fakes_are_what_kernels_give():
    """Shapes, strides, dtypes and devices."""
    x = torch.randn(2, 3, 4).permute(2, 0, 1)
    handle = ops.to_host(x, [1, 2, 0], True, 0)
    calls = ((ops.to_host, x, [1, 2, 0], True, 0), (ops.on_host, handle, x, x), (ops.to_device, handle, x, [1, 2, 0]))
    for op, *args in calls:
        args += [x.dtype, CPU, True] if op is ops.to_device else []
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
        for kind in ("shape", "stride", "dtype", "device"):
            one, other = (getattr(each, kind) for each in (real, fake))
            assert (one() if callable(one) else one) == (other() if callable(other) else other), (op, kind)


def test_memory_of_the_host_is_used_again_when_the_handle_is_gone(road):
    """However the handle goes: used up, or freed with a graph that nobody runs backward through."""
    before = set(transfers._held)
    for length in (100, 100, 50, 100):
        handles = [sent(torch.randn(length)) for _ in range(3)]
        assert road.memory.taken == 3 * 400
        back(handles[0])
        del handles
    sent(torch.randn(1000))
    assert road.memory.taken == 4000  # the blocks that are too small are gone
    assert set(transfers._held) == before


def test_the_block_before_is_on_its_way(road, monkeypatch):
    """Values of one stop come together; what is gone is passed by."""
    asked, ask = [], transfers.Sent.ask
    monkeypatch.setattr(transfers.Sent, "ask", lambda self: asked.append(self) or ask(self))
    handles = [sent(torch.full((3,), float(n)), new=n != 2) for n in range(5)]  # 0 | 1 2 | 3 | 4
    values = [transfers.sent_by(handle) for handle in handles]
    for number, ahead in ((4, {4, 3}), (3, {3, 2, 1}), (1, {2, 1, 0}), (2, {2, 0}), (0, {0})):
        asked.clear()
        assert back(handles[number])[0] == number
        assert {values.index(each) for each in asked} == ahead
    del values, handles[1:3]
    gc.collect()
    asked.clear()
    back(handles[1])
    assert transfers.sent_by(handles[0]) not in asked


def test_a_copy_of_a_handle_is_an_error():
    """Hooks on saved tensors make such copies; whatever they hold, it is not the value."""
    handle = sent(torch.randn(3))
    with pytest.raises(RuntimeError, match="Hooks on saved tensors"):
        back(handle.clone())
    back(handle.detach().view_as(handle))


def test_small_values_stay_and_are_watched(road):
    x = torch.randn(3)
    handle = sent(x, least=13)
    assert road.memory.taken == 0
    value = back(handle)
    assert torch.equal(value, x)
    assert value.data_ptr() != x.data_ptr()
    x.add_(1)
    with pytest.raises(RuntimeError, match="in-place"):
        back(handle)


def test_memory_of_the_host_is_of_the_size_asked_for(monkeypatch):
    """Nothing is rounded up; what torch's allocator has to give where the system pins nothing is in powers of two."""
    memory = host_memory.HostMemory(CPU)
    assert sum(part.numel() for part in memory.take(3 * 2**20 + 8).parts) == 3 * 2**20 + 8
    monkeypatch.setattr(torch, "empty", lambda size, **_: torch.zeros(size, dtype=torch.uint8))
    parts = [part.numel() for part in host_memory._pinned_by_torch(11 * 2**20 + 1)]
    assert parts == [8 * 2**20, 4 * 2**20]


def test_values_in_parts(road, monkeypatch):
    """One value may lie in several parts, and leave the last ones empty."""
    parts = [torch.empty(size, dtype=torch.uint8) for size in (64, 16, 8, 8)]
    made = {"size": 96, "parts": parts}
    monkeypatch.setattr(host_memory.Block, "__init__", lambda self, size, pinned: vars(self).update(made))
    x = torch.randn(21)
    assert torch.equal(back(sent(x)), x)
    assert torch.equal(torch.cat(parts[:2]), x.view(torch.uint8)[:80])


def test_too_little_memory_is_told_before_it_is_taken(tmp_path, monkeypatch):
    """The host's, or that of the process's control group, whichever has less free."""
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 4096 kB\n")
    group = tuple(tmp_path / name for name in ("max", "current", "stat"))
    monkeypatch.setattr(host_memory, "CONTROL_GROUPS", (group,))
    assert host_memory.available() == 4096 * 1024
    for path, text in zip(group, ("2097152\n", "2096128\n", "anon 5\ninactive_file 1024\n"), strict=True):
        path.write_text(text)
    assert host_memory.available() == 2048
    with pytest.raises(host_memory.HostMemoryError, match=r"needs 4\.0 KiB of host memory.* 2\.0 KiB are free"):
        sent(torch.randn(1024))
    (tmp_path / "max").write_text("max\n")
    sent(torch.randn(1024))
