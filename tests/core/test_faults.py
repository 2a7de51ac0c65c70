"""What an error that nobody expected says."""

from __future__ import annotations

import pytest
import torch

from mst_fx.core import faults


def test_an_op_that_torch_lacks_is_told():
    with pytest.raises(AttributeError) as raised:
        torch.ops.aten.no_such_op  # noqa: B018
    assert faults.missing_name(raised.value) == "torch.ops.aten.no_such_op"
