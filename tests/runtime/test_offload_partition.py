"""The partitioner under `offload`: around the user's own, named for caches, and a fault costs the offloading alone."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mst_fx.core.torch_private.partition import CustomPartitionerFn, aot_eager, default_partition
from mst_fx.inner_compiler import partitioned
from mst_fx.runtime import offload_partition, transfers
from mst_fx.runtime.offload import Offload, planned


class Own(CustomPartitionerFn):
    """A user's partitioner."""

    def __init__(self, name: str | None = "own") -> None:
        self.name, self.calls = name, 0

    def __call__(self, gm, joint_inputs, **how):
        self.calls += 1
        return default_partition(gm, joint_inputs, **how)

    def uuid(self):
        return self.name


def around(own):
    (partition,) = partitioned({"custom_partitioner_fn": own}).values()
    return partition


def gradient(partition, offload):
    """Of a step with one checkpointed block, and the bytes that it has sent."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))

    def step(x):
        return checkpoint(lambda x: model[1](x.tanh()).sin(), model[0](x), use_reentrant=False).sum()

    sent = []
    with planned(offload), pytest.MonkeyPatch.context() as patch:
        send = transfers.send
        patch.setattr(transfers, "send", lambda x, **how: sent.append(x.nbytes) or send(x, **how))
        x = torch.randn(4, 8, dtype=torch.float64)
        torch.compile(step, backend=lambda gm, inputs: aot_eager(gm, inputs, partition))(x).backward()
    return model[0].weight.grad, sent


def test_the_own_partitioner_divides_the_graph():
    own = Own()
    truth, nothing = gradient(around(own), None)
    ours, sent = gradient(around(own), Offload(0))
    assert (nothing, sent, own.calls) == ([], [4 * 8 * 8], 2)
    assert torch.equal(ours, truth)
    assert around(around(own)).own is own


def test_caches_are_told_what_is_done():
    names = []
    plans = (None, Offload(0), Offload(1), Offload(0, 1), Offload(0, loops=frozenset([("v", 4)])))
    for offload in (*plans, Offload(0, parameters=frozenset([((4, 4), torch.float32)]))):
        with planned(offload):
            names += [around(Own()).uuid(), around(Own("other")).uuid()]
            assert around(Own(None)).uuid() is None
    assert len(set(names)) == len(names) == 12


def test_a_fault_costs_the_offloading_alone(monkeypatch, caplog):
    truth, _ = gradient(around(Own()), None)
    monkeypatch.setattr(offload_partition, "_bring_back", lambda *_: 1 / 0)
    with caplog.at_level(logging.WARNING, "mst_fx"):
        ours, sent = gradient(around(Own()), Offload(0))
    assert sent == []
    assert torch.equal(ours, truth)
    assert "nothing goes to the host" in caplog.text
    with pytest.raises(Exception, match="division by zero"):
        gradient(around(Own()), Offload(0, strict=True))
