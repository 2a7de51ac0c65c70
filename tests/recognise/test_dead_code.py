"""What nobody reads is no part of the graph."""

from __future__ import annotations

import pytest
from beside import beside_eager, leaf


def inputs(_):
    return leaf(2, 5, 4), leaf(4, 16), leaf(16, 4)


def unread(x, up, down):
    (x @ up).relu() @ down
    return x * 2


def unread_beside_another(x, up, down):
    (x @ up).tanh() @ down
    return (x @ up).relu() @ down


@pytest.mark.parametrize(("program", "loops"), [(unread, 0), (unread_beside_another, 1)], ids=["alone", "beside"])
def test_an_mlp_that_nobody_reads(program, loops):
    (report,) = beside_eager(program, inputs)
    assert len(report.regions) == loops
    assert not report.refusals  # it is not there any more
