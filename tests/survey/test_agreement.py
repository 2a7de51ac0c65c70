"""Collectives written by hand: ranks may have other sizes, and run the same chunks where the user says so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured
from parallel_heads import CLASSES, HIDDEN, TOKENS, ByHand, Head
from torch.testing._internal.distributed.fake_pg import FakeStore

import mst_fx
from mst_fx.engine import Engine
from mst_fx.recognise.pattern import patterns


@pytest.fixture(autouse=True)
def group():
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "looped"),
    [
        ({"min_bytes": 0, "chunk_tokens": 8}, True),
        ({"modules": {"head": True}, "num_chunks": 4}, True),
        ({"min_bytes": 0}, False),
        ({"min_bytes": 1024, "chunk_tokens": 8}, False),
    ],
)
def test_the_user_says_what_ranks_agree_on(options, looped):
    x = torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    gm = captured(ByHand(Head(F.cross_entropy)), x, torch.randint(0, CLASSES, (2, TOKENS)))
    report = Engine(gm, mst_fx.Config(strict=True, **options), patterns()).rewritten().report
    assert [region.pattern for region in report.regions] == (["head"] if looped else [])
    told = [refusal for refusal in report.refusals if refusal.reason == "SHARDED"]
    assert [("communicates with other ranks" in each.text, "chunk_tokens" in each.advice) for each in told] == (
        [] if looped else [(True, True)]
    )
