"""What activation checkpointing runs again for backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from models import D, SwiGLU, V, tokens
from numerics import gradients, looped, relative_error
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def run_all_again(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_RECOMPUTE


POLICIES = {"default": {}, "of the user": {"context_fn": partial(create_selective_checkpoint_contexts, run_all_again)}}


class Blocks(nn.Module):
    """Checkpointed layers, one behind the other, with a norm and a head behind the last one.

    What the norm gives is read by the head alone, or by something else as well.
    """

    def __init__(self, count: int, *, alone: bool = False, **how) -> None:
        super().__init__()
        self.tokens, self.head, self.norm = nn.Embedding(V, D), nn.Linear(D, V, bias=False), nn.RMSNorm(D)
        self.norms = nn.ModuleList(nn.RMSNorm(D) for _ in range(count))
        self.mlps = nn.ModuleList(SwiGLU() for _ in range(count))
        self.how, self.alone = how, alone

    def forward(self, ids, labels):
        x = self.tokens(ids)
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = checkpoint(lambda x, norm=norm, mlp=mlp: x + mlp(norm(x)), x, use_reentrant=False, **self.how)
        x = self.norm(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return loss if self.alone else loss + x.square().mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "count", "alone", "again"),
    [
        ("default", 3, False, 0),
        ("default", 1, False, 1),
        ("of the user", 3, False, 1),
        ("of the user", 3, True, 0),  # the norm is looped with the head, whose gradients are made in the forward
    ],
)
def test_the_last_block_does_not_run_its_loop_again(policy, count, alone, again):
    """The norm behind it reads what it gives; the other blocks save what they read."""
    loops = []

    def counted(gm, _):
        loops.append(sum("mini_sequence_loop" in str(node.target) for node in gm.graph.nodes))
        return make_boxed_func(gm.forward)

    inner = aot_autograd(fw_compiler=counted, partition_fn=min_cut_rematerialization_partition)
    model, batch = Blocks(count, alone=alone, **POLICIES[policy]), tokens(2, 64)
    eager = gradients(model, model, batch)
    torch._dynamo.reset()
    ours = gradients(model, looped(model, inner=inner), batch)
    for name, value in eager.items():
        assert relative_error(ours[name], value) < 1e-5, name
    assert loops == [count + 1, count + again]
