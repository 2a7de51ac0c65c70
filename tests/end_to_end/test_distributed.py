"""Parts that are fully sharded, on one rank: loops inside of what is gathered. Several ranks: `test_many_ranks`."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from models import D, SwiGLU, V, tokens
from numerics import LoopAll, gradients, relative_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mst_fx


@pytest.fixture(autouse=True)
def _one_rank(tmp_path):
    torch.manual_seed(0)
    torch._dynamo.reset()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class HeadAndLoss(nn.Linear):
    """The logits stay inside of one module, as one module is gathered and compiled at a time."""

    def forward(self, x, labels):
        return F.cross_entropy(super().forward(x).flatten(0, 1), labels.flatten())


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mlp, self.head = nn.Embedding(V, D), SwiGLU(), HeadAndLoss(D, V)

    def forward(self, ids, labels):
        x = self.tokens(ids)
        return self.head(x + self.mlp(x), labels)


def test_fully_sharded_parts_are_looped():
    model, batch, mesh = Parts().double(), tokens(2), init_device_mesh("cpu", (1,))
    truth = gradients(model, model, batch)
    before = len(mst_fx.reports())
    for part in (model.mlp, model.head):
        part.compile(backend="mst_fx", options=LoopAll)
        fully_shard(part, mesh=mesh)
    ours = gradients(fully_shard(model, mesh=mesh), model, batch)
    found = [region.pattern for report in mst_fx.reports()[before:] for region in report.regions]
    assert found == ["gated_mlp", "head"]
    for name, value in truth.items():
        shard = ours[name]
        assert relative_error(shard.full_tensor() if name != "loss" else shard, value) < 1e-10
