"""A room to trace in: nothing that is switched on outside is on in it, and all of it is given back."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
import torch
from surrounding_modes import Counts, Looks

from mst_fx.core.clean_room import clean_room


def switched_on():
    """What is on, so that it can be compared."""
    x = torch.ones(1, requires_grad=True)
    x * x  # saves
    return {
        "functions": torch._C._len_torch_function_stack(),
        "dispatch": torch._C._len_torch_dispatch_stack(),
        "transforms": torch._C._functorch.peek_interpreter_stack() is not None,
        "anomaly": torch.is_anomaly_enabled(),
        "threads of backward": torch._C._is_multithreading_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "compiled autograd": torch._dynamo.compiled_autograd.compiled_autograd_enabled,
        "cache": torch.is_autocast_cache_enabled(),
        "grad": torch.is_grad_enabled(),
    }


def test_the_room_is_clean_and_all_is_given_back():
    packed = []

    def pack(x):
        packed.append(x)
        return x

    def fails(found):
        with clean_room():
            count = len(packed)
            found.update(switched_on())
            assert len(packed) == count
            raise KeyError

    def inside(value):
        before = switched_on()
        found = {}
        with pytest.raises(KeyError):
            fails(found)
        assert switched_on() == before
        assert not any(found[name] for name in ("functions", "dispatch", "transforms", "anomaly", "compiled autograd"))
        assert not any(found[name] for name in ("inference", "cache", "threads of backward"))
        assert all(before[name] for name in ("functions", "dispatch", "transforms", "anomaly", "compiled autograd"))
        return value

    with ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, pack))
        for around in (Counts(), Looks(), torch.autograd.set_detect_anomaly(True), torch.autocast("cpu")):
            stack.enter_context(around)
        stack.enter_context(torch._dynamo.compiled_autograd._enable(torch.compile))
        torch.vmap(inside)(torch.ones(2))
    assert packed


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_room_has_the_grad_mode_and_no_inference_mode(mode):
    with mode():
        before = switched_on()
        with clean_room():
            assert torch.is_grad_enabled() == before["grad"]
            assert not torch.is_inference_mode_enabled()
            assert not torch._C._is_multithreading_enabled()
        assert switched_on() == before


def test_one_thread_at_a_time_is_in_the_room():
    entered, may_leave, events = threading.Event(), threading.Event(), []

    def first():
        with clean_room():
            entered.set()
            may_leave.wait(10)
            events.append("the first leaves")

    def second():
        with clean_room():
            events.append("the second enters")

    threads = [threading.Thread(target=run) for run in (first, second)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    threads[1].join(0.5)
    may_leave.set()
    for thread in threads:
        thread.join()
    assert events == ["the first leaves", "the second enters"]
