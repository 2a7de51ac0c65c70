"""The examples for several ranks: gradients of one process, whichever way a text is shared, and loops in every part."""

from __future__ import annotations

import pytest
from ranks import on_ranks

fsdp_example = pytest.importorskip("fsdp_example")  # where transformers is not installed
GROUPS = ("--head-groups", "2")
FLAGS = [(), ("--tensor-parallel", "2", *GROUPS), ("--sequence-parallel", "2", *GROUPS)]
ROWS = ["fsdp", "ulysses", "tensor"]
pytestmark = pytest.mark.slow


def test_each_way_to_share_a_text_trains_as_one_process():
    trained, methods = on_ranks(2, fsdp_example.outcomes, FLAGS, ROWS, limit=120)
    for flags, found in zip(FLAGS, trained, strict=True):
        assert max(found["errors"]) < 1e-5, (flags, found["errors"])
        patterns = ["attention", "gated_mlp", "head"] if flags else ["gated_mlp", "head"]
        assert found["regions"] == patterns, (flags, found["regions"])
        assert found["losses"][-1] < found["losses"][0], (flags, found["losses"])
        assert found["peak"] > 0
    assert len(methods) == 3 * len(ROWS)
    assert max(methods.values()) < 1e-5, methods
