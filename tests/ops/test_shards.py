"""What stands between DTensors and ops on shards: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from mst_fx.ops.shards import crosses, enter, leave


@pytest.fixture
def mesh():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate(), Partial()])
def test_a_shard_leaves_as_it_was(mesh, placement):
    local = torch.randn(4, 6)
    given = DTensor.from_local(local, mesh, [placement], run_check=False)
    back = leave(enter(given, (Replicate(),)), given, (placement,))
    assert back.placements == given.placements
    assert back.shape == given.shape
    torch.testing.assert_close(back.to_local(), local)


@pytest.mark.parametrize("grads", [(Partial(),), (Replicate(),)])
def test_the_gradient_comes_back_as_it_is_told(mesh, grads):
    given = DTensor.from_local(torch.randn(4, 6), mesh, [Replicate()], run_check=False).requires_grad_()
    (grad,) = torch.autograd.grad(enter(given, grads).sum(), given)
    assert grad.placements == grads


def test_a_share_is_divided_and_its_gradient_is_not(mesh):
    given = DTensor.from_local(torch.full((3,), 6.0), mesh, [Replicate()], run_check=False).requires_grad_()
    share = enter(given, (Replicate(),), 2)
    (share * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert share.tolist() == [3, 3, 3]
    assert given.grad.to_local().tolist() == [1, 2, 3]


def test_which_calls_cross():
    assert [crosses(target) for target in (enter, leave, torch.relu, "to_local")] == [True, True, False, False]
