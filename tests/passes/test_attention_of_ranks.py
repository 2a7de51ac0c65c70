"""Attention by groups of heads where ranks share a sequence: each group exchanges its own heads.

Regions are verified, forward and backward, as if ranks gave their parts back.

Axes: B batch, T tokens of a rank, D model, H heads, G heads of the keys, E features of a head.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F  # noqa: N812
from graphs import captured
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from ulysses import SPELLINGS, by_torch

import mst_fx
from mst_fx.engine import Engine
from mst_fx.recognise.pattern import patterns

B, T, D, H, E = 2, 8, 16, 8, 16  # more features than heads, as in any model
OPTIONS = {"strict": True, "min_bytes": 0, "head_groups": H, "verify": True}


@pytest.fixture(autouse=True)
def _group(request):
    ranks = getattr(request, "param", 2)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    yield
    dist.destroy_process_group()


class Attention(nn.Module):
    """Attention whose queries, keys and values go through what `attend` does."""

    def __init__(self, attend, keys: int = H) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, heads * E, bias=False) for heads in (H, keys, keys))
        self.o, self.attend = nn.Linear(H * E, D), attend

    def forward(self, x):
        q, k, v = (made(x).unflatten(-1, (-1, E)).transpose(1, 2) for made in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))


def rewritten(model, **options):
    gm = captured(model, torch.randn(B, T, D, requires_grad=True))
    return Engine(gm, mst_fx.Config(**{**OPTIONS, **options}), patterns()).rewritten()


def report_on(model, **options):
    return rewritten(model, **options).report


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("keys", "groups"), [(H, 4), (4, 2), (2, 4)])
def test_each_group_exchanges_its_heads(spelling, keys, groups):
    """Also where all queries of a rank share one head of the keys: these are exchanged once, their gradients added."""
    (region,) = report_on(Attention(SPELLINGS[spelling](dist.group.WORLD), keys)).regions
    assert (region.pattern, region.chunks, region.verified) == ("attention", groups, True)
    assert "self.o(" in region.source


def test_no_exchange_that_nobody_reads():
    """Forward exchanges four values; backward exchanges them again, and the gradients of all four."""
    module = rewritten(Attention(by_torch(dist.group.WORLD)), verify=False).module
    bodies = [getattr(module, name) for name in ("mini_sequence_forward_0", "mini_sequence_backward_0")]
    ops = ([node.target for node in body.graph.nodes] for body in bodies)
    assert [found.count(torch.ops._c10d_functional.all_to_all_single.default) for found in ops] == [4, 4 + 4]


def test_gathered_keys():
    """Each rank gathers keys and values of all tokens."""

    def attend(q, k, v):
        k, v = (funcol.all_gather_tensor_autograd(x.contiguous(), 2, dist.group.WORLD) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    (region,) = report_on(Attention(attend)).regions
    assert (region.pattern, region.chunks, region.verified) == ("attention", H, True)


def uneven(q, k, v):
    """Ranks have other numbers of heads."""
    parts, group = [6, 2], dist.group.WORLD
    given = (funcol.all_to_all_single_autograd(x.movedim(1, 0).contiguous(), parts, parts, group) for x in (q, k, v))
    return F.scaled_dot_product_attention(*(x.movedim(0, 1) for x in given))


@pytest.mark.parametrize("_group", [H], indirect=True)
def test_one_head_a_rank_is_refused():
    (refusal,) = report_on(Attention(by_torch(dist.group.WORLD))).refusals
    assert refusal.text.endswith("all_to_all_single.default gives each rank one position of the split dim")
    assert "fewer ranks" in refusal.advice
    assert "all_to_all_single_autograd" in refusal.source


def test_parts_of_unlike_sizes_are_refused():
    (refusal,) = report_on(Attention(uneven)).refusals
    assert refusal.text.endswith("all_to_all_single.default divides the split dim among the ranks")
    assert "all_to_all_single_autograd" in refusal.source


def test_the_user_says_how_many_groups():
    (refusal,) = report_on(Attention(by_torch(dist.group.WORLD)), head_groups=None, modules={"*": True}).refusals
    assert (refusal.reason, "head_groups" in refusal.advice) == ("SHARDED", True)
