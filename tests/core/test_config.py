"""The options: what they may be, and what they mean in bytes."""

from __future__ import annotations

import pytest

from mst_fx.core.config import Config

GIB = 2**30


@pytest.mark.parametrize(
    ("budget", "count"),
    [("40GiB", 40 * GIB), ("1.5 TB", 1.5e12), (0.25, 20 * GIB), (1.0, 80 * GIB), (12345, 12345), (None, None)],
)
def test_spellings_of_a_budget(budget, count):
    assert Config(memory_budget=budget).budget_bytes(80 * GIB) == count
