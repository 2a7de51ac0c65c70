"""What layers save for backward, predicted, and what AOTAutograd's partitioner saves. B batch, T tokens, H heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured
from memory_probe import saved_bytes
from models import SwiGLU
from torch import nn
from torch._dynamo import lookup_backend

import mst_fx
from mst_fx.recognise.pattern import patterns
from mst_fx.survey.survey import Surveyor
from mst_fx.survey.surveyed import timeline_of

PARTITIONED = lookup_backend("aot_eager_decomp_partition")  # Inductor's choice of what is saved, without its kernels
B, T, D, H, KV = 2, 64, 64, 4, 2
OPTIONS = {"min_bytes": 0, "chunk_tokens": 16}


def rms(x, scale):
    wide = x.float()
    return scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotated(x, cos, sin):
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class Layer(nn.Module):
    """A decoder layer with grouped queries and rotary positions: norms in front."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, D, False), nn.Linear(D, D, False)
        self.k, self.v = (nn.Linear(D, D * KV // H, False) for _ in range(2))
        self.scales = nn.ParameterList(torch.ones(D) for _ in range(4))
        self.mlp = SwiGLU(D, 4 * D)

    def heads(self, x):
        return x.view(B, T, -1, D // H).transpose(1, 2)

    def queries_and_keys(self, x):
        return self.heads(self.q(x)), self.heads(self.k(x))

    def out(self, y, x):
        return self.o(y)

    def attention(self, x, cos, sin):
        q, k = (rotated(y, cos, sin) for y in self.queries_and_keys(x))
        y = F.scaled_dot_product_attention(q, k, self.heads(self.v(x)), is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(B, T, D), x)

    def forward(self, x, *positions):
        x = x + self.attention(rms(x, self.scales[0]), *positions)
        return x + self.mlp(rms(x, self.scales[1]))


class NormedAndGated(Layer):
    """Queries and keys have norms of their own; attention's result has a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.gate = nn.Parameter(torch.ones(D // H)), nn.Linear(D, D)

    def queries_and_keys(self, x):
        return (rms(y, self.scale) for y in super().queries_and_keys(x))

    def out(self, y, x):
        return self.o(y * torch.sigmoid(self.gate(x)))


class Parallel(Layer):
    """What attention gives lies head by head: the output projection reads a copy, and backward what was copied."""

    def queries_and_keys(self, x):
        return (y.contiguous() for y in super().queries_and_keys(x))

    def forward(self, x, *positions):
        normed = rms(x, self.scales[0])
        return x + self.attention(normed, *positions) + self.mlp(normed)


class NormsBehind(Layer):
    """As many as in front."""

    def forward(self, x, *positions):
        x = x + rms(self.attention(x, *positions), self.scales[0])
        return x + rms(self.mlp(x), self.scales[1])


class NormsAround(Layer):
    """In front and behind."""

    def forward(self, x, *positions):
        x = x + rms(self.attention(rms(x, self.scales[0]), *positions), self.scales[1])
        return x + rms(self.mlp(rms(x, self.scales[2])), self.scales[3])


class Frozen(Layer):
    """Nothing but an adapter is trained: of a product with a frozen weight, backward does not read the other factor."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(D, 4, False), nn.Linear(4, D, False)

    def out(self, y, x):
        return self.o(y) + self.up(self.down(y))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Layer, NormedAndGated, Parallel, NormsBehind, NormsAround, Frozen])
def test_bytes_saved_by_layers(kind):
    torch.manual_seed(0)
    layers = nn.ModuleList(kind() for _ in range(2)).to(torch.bfloat16)
    positions = [torch.randn(T, D // H, dtype=torch.bfloat16) for _ in range(2)]
    x = torch.randn(B, T, D, dtype=torch.bfloat16, requires_grad=True)

    def program(x):
        for layer in layers:
            x = layer(x, *positions)
        return x.sum()

    def measured(**how):
        torch._dynamo.reset()
        compiled = torch.compile(program, **how)
        return saved_bytes(lambda: compiled(x), [x, *positions, *layers.parameters()])

    surveyor = Surveyor(mst_fx.Config(**OPTIONS), patterns())
    surveyed = surveyor.survey(captured(program, x))
    outside = sum(segment.saved for segment in timeline_of(surveyed).segments)
    memories = [surveyor.offer(site).memory for site in surveyed.all_sites()]
    looped, whole = (outside + sum(getattr(m, name) for m in memories) for name in ("saved", "saved_whole"))
    assert len(memories) == 2
    assert 0.93 <= whole / measured(backend=PARTITIONED) <= 1.03
    assert 0.93 <= looped / measured(backend="mst_fx", options={"inner": PARTITIONED, **OPTIONS}) <= 1.03
