"""Products in float8."""

from __future__ import annotations

import pytest
import torch


def _takes_scales_of_rows() -> bool:
    """Whether this torch multiplies float8 with a scale a row on a CPU; 2.11 takes one scale a tensor there."""
    left, right = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 16).t().to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(left, right, torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


needs_scales_of_rows = pytest.mark.skipif(not _takes_scales_of_rows(), reason="no float8 scales a row on this CPU")
