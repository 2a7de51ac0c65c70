"""Small models of the kinds that the tests need. Legend: V vocabulary, D model width, F feed-forward width."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

V, D, FF = 120, 32, 96


class SwiGLU(nn.Module):
    """Two up-projections, one down."""

    def __init__(self, d: int = D, f: int = FF, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, f, bias), nn.Linear(d, f, bias), nn.Linear(f, d, bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Gelu(nn.Module):
    """One up-projection with bias, one down."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    """Causal self-attention with a fused projection."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(D, 3 * D), nn.Linear(D, D), heads

    def forward(self, x):
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, s, d))


class NanoGPT(nn.Module):
    """Decoder written by hand: norms, attention, GELU MLPs, tied head, loss over all tokens."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(64, D)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(D), Attention(), nn.LayerNorm(D), Gelu()]) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, labels):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for norm1, attention, norm2, mlp in self.blocks:
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, V), labels.view(-1), ignore_index=-1)


class MlpLM(nn.Module):
    """Embedding, one MLP with a residual, a head with bias, the mean loss of the labels."""

    def __init__(self, mlp: nn.Module | None = None, tail=lambda logits: logits, **loss) -> None:
        super().__init__()
        self.tokens, self.mlp, self.head = nn.Embedding(V, D), mlp or SwiGLU(), nn.Linear(D, V)
        self.tail, self.loss = tail, loss

    def forward(self, ids, labels):
        x = self.tokens(ids)
        x = x + self.mlp(x)
        logits = self.tail(self.head(x))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **self.loss)


class CheckpointedLM(MlpLM):
    """Its MLP runs again for backward in any case."""

    def forward(self, ids, labels):
        x = self.tokens(ids)
        x = x + checkpoint(self.mlp, x, use_reentrant=False)
        return F.cross_entropy(self.head(x).flatten(0, -2), labels.flatten())


def tokens(batch: int = 1, length: int = 37, ignored: int = 5):
    """Ids and labels [batch, length]; the first `ignored` labels of each row are -100."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    ids = torch.randint(0, V, (batch, length), generator=generator)
    labels = torch.randint(0, V, (batch, length), generator=generator)
    labels[:, :ignored] = -100
    return ids, labels
