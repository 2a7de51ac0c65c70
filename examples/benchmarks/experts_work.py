"""The pieces of work of `experts.py`: shapes of well-known models, each in the spelling of the library that trains it.

Legend: T tokens, H hidden, F feed-forward of an expert, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from turns import Inputs


@dataclass(frozen=True)
class Mixture:
    """One mixture of experts.

    Attributes:
        title: for the table.
        fn: takes tokens, weights, choices and matrices.
        matrices: the shapes of what has a gradient besides tokens and weights, by H, F and E.
        h, f, e, k: the sizes.
        tokens: lengths to measure if none are asked for.
    """

    title: str
    fn: Callable[..., torch.Tensor]
    matrices: Callable[[int, int, int], list[tuple[int, ...]]]
    h: int
    f: int
    e: int
    k: int
    tokens: tuple[int, ...]


def ends_of(keys, groups):
    keys = keys.float() if keys.device.type == "cpu" else keys.int()
    return torch.histc(keys, groups, 0, groups - 1).cumsum(0, dtype=torch.int32)


def brought_back(rows, order, weights_TK):
    """Rows in the order of their tokens again, times their weights, added up over K."""
    rows = rows * weights_TK.reshape(-1)[order, None]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return rows[inverse].view(*weights_TK.shape, -1).sum(1)


def one_up_matrix(x_TH, weights_TK, experts_TK, up, down):
    """Gate and up in one matrix, [out, in]: transformers."""
    keys, order = torch.sort(experts_TK.reshape(-1))
    ends = ends_of(keys, up.shape[0])
    gate, value = F.grouped_mm(x_TH[order // weights_TK.shape[1]], up.transpose(-2, -1), offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * value, down.transpose(-2, -1), offs=ends)
    return brought_back(rows, order, weights_TK)


def with_biases(x_TH, weights_TK, experts_TK, up, up_bias, down, down_bias):
    """Biases, every other column a gate, matrices [in, out]: gpt-oss in transformers."""
    keys, order = torch.sort(experts_TK.reshape(-1))
    ends = ends_of(keys, up.shape[0])
    rows = F.grouped_mm(x_TH[order // weights_TK.shape[1]], up, offs=ends) + up_bias[keys]
    gate, value = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(-7.0, 7.0)
    rows = (value + 1) * gate * torch.sigmoid(gate * 1.702)
    rows = F.grouped_mm(rows, down, offs=ends) + down_bias[keys]
    return brought_back(rows, order, weights_TK)


def with_a_shared_one(x_TH, weights_TK, experts_TK, gate, up, down, shared_gate, shared_up, shared_down):
    """Three matrices, rows added to their tokens by index, and an expert that sees all tokens: torchtitan."""
    order = torch.argsort(experts_TK.view(-1), stable=True)
    ends = ends_of(experts_TK.view(-1), up.shape[0])
    token = order // weights_TK.shape[1]
    rows = x_TH[token]
    hidden = F.silu(torch._grouped_mm(rows, gate.transpose(-2, -1), offs=ends))
    hidden = hidden * torch._grouped_mm(rows, up.transpose(-2, -1), offs=ends)
    rows = torch._grouped_mm(hidden, down.transpose(-2, -1), offs=ends) * weights_TK.view(-1)[order, None]
    shared = F.linear(F.silu(F.linear(x_TH, shared_gate)) * F.linear(x_TH, shared_up), shared_down)
    return torch.zeros_like(x_TH).index_add(0, token, rows) + shared


WORK = {
    "qwen3": Mixture(
        "128 experts of 2,048 x 768, 8 a token",
        one_up_matrix,
        lambda h, f, e: [(e, 2 * f, h), (e, h, f)],
        *(2048, 768, 128, 8),
        tokens=(16384, 65536, 131072),
    ),
    "gpt-oss": Mixture(
        "32 experts of 2,880 x 2,880 with biases, 4 a token",
        with_biases,
        lambda h, f, e: [(e, h, 2 * f), (e, 2 * f), (e, f, h), (e, h)],
        *(2880, 2880, 32, 4),
        tokens=(65536,),
    ),
    "deepseek": Mixture(
        "256 experts of 2,048 x 512, 8 a token, and one for all",
        with_a_shared_one,
        lambda h, f, e: [(e, f, h), (e, f, h), (e, h, f), (f, h), (f, h), (h, f)],
        *(2048, 512, 256, 8),
        tokens=(131072,),
    ),
}
SMALL = {"h": 64, "f": 128, "e": 8, "k": 2, "tokens": (500,)}


def inputs_of(work: Mixture, tokens: int, device: torch.device) -> Inputs:
    """Random tensors in bfloat16, the only dtype in which a grouped product is compiled."""

    def tensor(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * scale).bfloat16().requires_grad_()

    x_TH = tensor(tokens, work.h, scale=1.0)
    weights, chosen = torch.topk(torch.rand(tokens, work.e, device=device), work.k)
    weights_TK = weights.bfloat16().requires_grad_()
    matrices = [tensor(*shape) for shape in work.matrices(work.h, work.f, work.e)]
    upstream = torch.randn_like(x_TH, requires_grad=False)
    return Inputs([x_TH, weights_TK, chosen, *matrices], [x_TH, weights_TK, *matrices], upstream)
