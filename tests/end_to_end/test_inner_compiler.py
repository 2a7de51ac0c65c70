"""The compiler behind the backend: what modes and foreign options mean for it."""

from __future__ import annotations

import pytest
import torch

import mst_fx
from mst_fx import pipeline


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


def test_mode_and_foreign_options_reach_inductor(monkeypatch):
    from torch._inductor import compile_fx as module

    seen = []
    original = module.compile_fx
    monkeypatch.setattr(module, "compile_fx", lambda *a, **k: seen.append(k.get("config_patches")) or original(*a, **k))
    torch.compile(lambda x: x + 1, backend=mst_fx.backend, mode="max-autotune-no-cudagraphs")(torch.ones(2))
    torch.compile(lambda x: x + 2, backend=mst_fx.backend, options={"epilogue_fusion": False, "strict": True})(
        torch.ones(2)
    )
    torch.compile(lambda x: x + 3, backend="mst_fx", options={"mode": "max-autotune-no-cudagraphs", "strict": True})(
        torch.ones(2)
    )
    patches = [entry for entry in seen if entry]  # compile_fx calls itself
    assert patches[0]["max_autotune"] is True
    assert patches[1]["epilogue_fusion"] is False
    assert not {"strict", "mode"} & {name for patch in patches for name in patch}
    assert [patch.get("max_autotune") for patch in patches] == [True, None, True]


def test_mode_reaches_a_callable():
    seen = {}

    def inner(gm, inputs, **kwargs):
        seen.update(kwargs)
        return gm

    torch.compile(lambda x: x + 1, backend=mst_fx.backend, options={"inner": inner, "triton.cudagraphs": True})(
        torch.ones(2)
    )
    assert seen == {"options": {"triton.cudagraphs": True}}
    seen.clear()
    torch.compile(lambda x: x + 2, backend="mst_fx", options={"inner": inner, "mode": "default"})(torch.ones(2))
    assert seen == {}


def test_cpp_wrapper_is_refused():
    refusal = pipeline._engine(torch.fx.symbolic_trace(lambda x: x), mst_fx.Config(), {"cpp_wrapper": True})
    assert refusal.reason is mst_fx.Reason.BACKEND
