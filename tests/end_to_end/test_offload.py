"""What checkpoints keep is on the host from forward to backward: numbers, bytes, caches, and who says what."""

from __future__ import annotations

import pytest
import torch
from memory_probe import saved_bytes
from models import D, SwiGLU, V, tokens
from numerics import LoopAll, gradients, looped, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.runtime import transfers


class Layer(nn.Module):
    """Attention of one head, in few ops, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.mlp = nn.RMSNorm(D), nn.Linear(D, 3 * D), SwiGLU()

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        return x + self.mlp(x)


class LM(nn.Module):
    """Checkpointed layers; `compiled` compiles each of them with its checkpoint, one by one."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.tokens, self.head, self.layers = nn.Embedding(V, D), nn.Linear(D, V), nn.ModuleList()
        self.layers.extend(Layer() for _ in range(layers))
        self.run = checkpointed

    def forward(self, ids, labels):
        x = self.tokens(ids)
        for layer in self.layers:
            x = self.run(layer, x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def checkpointed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def compiled(model: LM, how: str, dynamic: bool | None = None, **options):
    """The step of a model, as one graph or layer by layer."""
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "verify": False, "offload": "checkpoints", **options}
    if how == "layers":
        model.run = looped(checkpointed, dynamic=dynamic, **options)
        return model
    return looped(model, dynamic=dynamic, **options)


@pytest.fixture
def moves(monkeypatch):
    """Sends (S, or s within a stop) and returns (B) in the order in which they run."""
    moves, send, come_back = [], transfers.send, transfers.come_back
    monkeypatch.setattr(transfers, "send", lambda x, **how: moves.append("S" if how["new"] else "s") or send(x, **how))
    monkeypatch.setattr(transfers, "come_back", lambda handle: moves.append("B") or come_back(handle))
    return moves


@pytest.mark.parametrize("how", ["step", "layers"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_and_saved_bytes(how, dynamic, moves):
    """One value a layer leaves, whatever the length, and nothing is on the host behind the step."""
    model = LM().double()
    batches = [tokens(2, 40), tokens(2, 56), tokens(2, 40)]
    truths = [gradients(model, model, batch) for batch in batches]
    step = compiled(model, how, dynamic)
    for batch, truth in zip(batches, truths, strict=True):
        ours = gradients(model, step, batch)
        assert all(relative_error(ours[name], value) < 1e-12 for name, value in truth.items())
        assert "".join(moves) == "SSSBBB"
        moves.clear()
        assert not transfers._held
    sent = {x.bytes for report in mst_fx.reports()[-1:] for x in report.offloaded}
    assert sent <= {2 * 40 * D * 8, 2 * 56 * D * 8}


@pytest.mark.parametrize("how", ["step", "layers"])
def test_what_is_saved_is_what_is_reported_less(how):
    model, batch = LM().double(), tokens(2, 40)
    saved = {}
    for offload in (None, "checkpoints"):
        model.run = checkpointed
        step = compiled(model, how, offload=offload)
        saved[offload] = saved_bytes(lambda step=step: step(*batch), model.parameters())
    one = 2 * 40 * D * 8
    assert saved[None] - saved["checkpoints"] == 3 * (one - 1)
