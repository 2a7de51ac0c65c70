"""The pieces of work of `peers.py`: shapes of well-known models, and the code as their users write it.

Legend: T tokens, H hidden, V vocabulary, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from turns import Inputs


@dataclass(frozen=True)
class Work:
    """One piece of work.

    Attributes:
        title: for the table; {tokens} is filled in.
        kind: "head" or "mlp".
        fn: takes the inputs.
        sizes: of the weights; hidden first.
        tokens: lengths to measure if none are asked for.
        soft_cap: of the logits, 0 for none.
    """

    title: str
    kind: str
    fn: Callable[..., torch.Tensor]
    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    soft_cap: float = 0.0


def head_loss(x, w, y):
    return F.cross_entropy(F.linear(x, w).float(), y)


def capped_head_loss(x, w, y):
    return F.cross_entropy(torch.tanh(F.linear(x, w).float() / 30) * 30, y)


def swiglu(x, g, u, d):
    return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)


def geglu(x, g, u, d):
    return F.linear(F.gelu(F.linear(x, g), approximate="tanh") * F.linear(x, u), d)


def gelu(x, u, d):
    return F.linear(F.gelu(F.linear(x, u)), d)


HEAD = "LM head + cross-entropy, {tokens} tokens x"
WORK = {
    "head-llama3": Work(f"{HEAD} 4,096 x 128,256", "head", head_loss, (4096, 128256), (16384,)),
    "head-qwen3": Work(f"{HEAD} 2,048 x 151,936", "head", head_loss, (2048, 151936), (16384,)),
    "head-gemma2": Work(
        f"{HEAD} 3,584 x 256,000, soft-cap", "head", capped_head_loss, (3584, 256000), (16384,), soft_cap=30.0
    ),
    "swiglu-8b": Work("SwiGLU MLP, {tokens} tokens x 4,096 x 14,336", "mlp", swiglu, (4096, 14336), (65536,)),
    "swiglu-70b": Work("SwiGLU MLP, {tokens} tokens x 8,192 x 28,672", "mlp", swiglu, (8192, 28672), (65536,)),
    "geglu-8b": Work("GeGLU MLP, {tokens} tokens x 4,096 x 14,336", "mlp", geglu, (4096, 14336), (65536,)),
    "gelu-8b": Work("GELU MLP, {tokens} tokens x 4,096 x 16,384", "mlp", gelu, (4096, 16384), (65536,)),
}
SMALL = {"head": (64, 1000), "mlp": (64, 256)}


def inputs_of(work: Work, tokens: int, device: torch.device, *, small: bool) -> Inputs:
    """Random tensors, bfloat16 on a GPU and float32 elsewhere."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = SMALL[work.kind] if small else work.sizes

    def tensor(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return (torch.randn(*shape, device=device, dtype=torch.float32) * scale).to(dtype).requires_grad_()

    hidden = sizes[0]
    x_TH = tensor(tokens, hidden, scale=1.0)
    if work.kind == "head":
        w_VH = tensor(sizes[1], hidden)
        return Inputs([x_TH, w_VH, torch.randint(0, sizes[1], (tokens,), device=device)], [x_TH, w_VH])
    ups = [tensor(sizes[1], hidden) for _ in range(1 if work.fn is gelu else 2)]
    leaves = [x_TH, *ups, tensor(hidden, sizes[1])]
    return Inputs(leaves, leaves, torch.randn_like(x_TH, requires_grad=False))
