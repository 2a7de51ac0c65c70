"""What an error that nobody expected says."""

from __future__ import annotations

import pytest
import torch

from mst_fx.core import faults


def test_an_op_that_torch_lacks_is_told():
    with pytest.raises(AttributeError) as raised:
        torch.ops.aten.no_such_op  # noqa: B018
    assert faults.missing_name(raised.value) == "torch.ops.aten.no_such_op"


@pytest.mark.parametrize(
    ("version", "is_told"), [("2.9.1+cu128", True), ("2.11.0", False), ("2.100", False), ("x", False)]
)
def test_a_torch_that_is_too_old_is_told(monkeypatch, caplog, version, is_told):
    monkeypatch.setattr(torch, "__version__", version)
    text = faults.unfit_torch()
    assert (text is not None) is is_told
    assert (f"needs torch 2.11 or newer, and this is {version}" in caplog.text) is is_told
