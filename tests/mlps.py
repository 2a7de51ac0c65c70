"""MLPs as they are written, each a module of [B, T, D] tokens. Legend: B batch, T tokens, D model, F feed-forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

D, FF, R = 16, 48, 4


class Mlp(nn.Module):
    """What any of them may need: projections by name, and a function of the module and the tokens."""

    def __init__(self, compute: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.gate, self.up, self.down = (nn.Linear(a, b) for a, b in ((D, FF), (D, FF), (FF, D)))
        self.both = nn.Linear(D, 2 * FF, bias=False)
        self.narrow = nn.ModuleList(nn.Linear(a, R, bias=False) for a in (D, D, FF))
        self.widen = nn.ModuleList(nn.Linear(R, b, bias=False) for b in (FF, FF, D))
        self.norm, self.wide_norm = nn.LayerNorm(D), nn.LayerNorm(FF)
        self.scale, self.wide_scale = nn.Parameter(torch.rand(())), nn.Parameter(torch.rand(FF))
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.register_buffer("quantised_up", torch.randint(-127, 127, (FF, D), dtype=torch.int8))
        self.register_buffer("quantised_down", torch.randint(-127, 127, (D, FF), dtype=torch.int8))
        self.steps = nn.Parameter(torch.rand(FF, 1) / 127, requires_grad=False)

    def forward(self, x_BTD):
        return self.compute(self, x_BTD)

    def adapted(self, linear, i, x):
        """A projection with a low-rank adapter."""
        return linear(x) + self.widen[i](self.narrow[i](x)) * 0.5

    def dora(self, linear, i, x):
        """A projection whose weight is adapted in direction and scaled to a magnitude of its own."""
        weight = linear.weight + self.widen[i].weight @ self.narrow[i].weight
        magnitude = (linear.weight.norm(dim=1) / weight.norm(dim=1).detach()).unsqueeze(0)
        adapter = self.widen[i](self.narrow[i](x))
        return linear(x) + (magnitude - 1) * F.linear(x, linear.weight) + magnitude * adapter

    def attention(self, x):
        """Causal self-attention of one head."""
        return self.out(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=True))


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * x.pow(3.0))))


def xielu(x, a, b):
    return torch.where(x > 0, a * x * x + 0.5 * x, (torch.expm1(x.clamp(max=-1e-6)) - x) * b + 0.5 * x)


def split_by_view(m, x):
    gate, up = m.both(x).view(*x.shape[:-1], 2, FF).unbind(-2)
    return m.down(F.silu(gate) * up)


def interleaved(m, x):
    both = m.both(x)
    return m.down(F.glu(torch.cat([both[..., ::2], both[..., 1::2]], -1)))


def fused_with_clamp(m, x):
    gate, up = m.both(x).chunk(2, -1)
    gate = gate.clamp(max=7.0)
    return m.down((up.clamp(-7.0, 7.0) + 1) * (gate * torch.sigmoid(gate * 1.702)))


def parallel_block(m, x):
    y = m.norm(x)
    return x + m.attention(y) + m.down(F.gelu(m.up(y)))


def adaptive_norm(m, x):
    shift, scale, gate = m.qkv(x.mean(1)).unsqueeze(1).chunk(3, -1)  # one row a batch element, for all its tokens
    return x + gate * m.down(F.gelu(m.up(m.norm(x) * (1 + scale) + shift)))


def convolution_of_one_token(m, x):
    y = F.conv1d(x.transpose(1, 2), m.up.weight.unsqueeze(-1), m.up.bias)
    return F.conv1d(F.gelu(y), m.down.weight.unsqueeze(-1), m.down.bias).transpose(1, 2)


def quantised(m, x):
    up = m.quantised_up.to(x.dtype) * m.steps
    down = m.quantised_down.to(x.dtype) * m.steps[:D]
    return F.linear(F.gelu(F.linear(x, up, m.up.bias)), down, m.down.bias)


PLAIN = {
    "ReLU": lambda m, x: m.down(F.relu(m.up(x))),
    "convolution": convolution_of_one_token,
    "squared ReLU": lambda m, x: m.down(F.relu(m.up(x)).square()),
    "NewGELU": lambda m, x: m.down(new_gelu(m.up(x))),
    "QuickGELU": lambda m, x: m.down((y := m.up(x)) * torch.sigmoid(1.702 * y)),
    "xIELU": lambda m, x: m.down(xielu(m.up(x), F.softplus(m.scale), m.scale)),
    "flat tokens": lambda m, x: torch.addmm(
        m.down.bias, F.gelu(torch.addmm(m.up.bias, x.view(-1, D), m.up.weight.t())), m.down.weight.t()
    ).view(x.shape),
    "norm inside": lambda m, x: m.down(m.wide_norm(F.gelu(m.up(x)))),
    "RMS norm inside": lambda m, x: m.down(F.rms_norm(F.gelu(m.up(x)), (FF,), m.wide_scale)),
    "in float32": lambda m, x: m.down(F.gelu(m.up(x).float()).to(x.dtype)),
    "scales that are tensors": lambda m, x: m.down(F.gelu(m.up(x) * m.scale) * m.wide_scale / m.scale.detach().abs()),
    "parallel attention": parallel_block,
    "adaptive norm": adaptive_norm,
    "encoder layer": lambda m, x: m.norm(x + m.down(F.dropout(F.relu(m.up(x)), 0.0))),
    "adapters": lambda m, x: m.adapted(m.down, 2, F.gelu(m.adapted(m.up, 1, x))),
    "factorised": lambda m, x: m.attention(x + m.down(F.gelu(m.widen[1](m.narrow[1](x))))),
    "adapter on down": lambda m, x: m.adapted(m.down, 2, F.gelu(m.up(x))),
    "quantised weights": quantised,
    "statistics of the activation": lambda m, x: m.down(y := F.relu(m.up(x))) * (y > 0).double().mean().to(x.dtype),
}
GATED = {
    "gate first": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
    "up first": lambda m, x: m.down(m.up(x) * F.gelu(m.gate(x), approximate="tanh")),
    "chunk": lambda m, x: m.down(F.silu((both := m.both(x).chunk(2, -1))[0]) * both[1]),
    "split": lambda m, x: m.down((both := m.both(x).split(FF, -1))[1] * F.silu(both[0])),
    "unbind": split_by_view,
    "slices": lambda m, x: m.down(F.silu((both := m.both(x))[..., :FF]) * both[..., FF:]),
    "GLU of interleaved": interleaved,
    "clamped": fused_with_clamp,
    "T5": lambda m, x: (
        x + m.down(F.dropout(new_gelu(m.gate(m.norm(x))) * m.up(m.norm(x)), 0.0).to(m.down.weight.dtype))
    ),
    "receptance": lambda m, x: torch.sigmoid(m.out(x)) * m.down(F.relu(m.up(x)).square() * m.gate(x)),
    "adapters": lambda m, x: m.adapted(m.down, 2, F.silu(m.adapted(m.gate, 0, x)) * m.adapted(m.up, 1, x)),
    "magnitude and direction": lambda m, x: m.dora(m.down, 2, F.silu(m.dora(m.gate, 0, x)) * m.dora(m.up, 1, x)),
    "bilinear": lambda m, x: m.down(m.gate(x) * m.up(x)),
}
