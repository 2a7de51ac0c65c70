"""Mixtures of experts as they are written. Legend: N tokens, K experts a token, E experts, D model, F feed-forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

D, FF, E, K = 8, 24, 4, 2


class Experts(nn.Module):
    """A router, and one gated MLP an expert; `mix` computes what the experts give to the tokens.

    The choice of experts is given: rounding must not change it from one run to the next.
    """

    def __init__(self, mix: Callable[..., torch.Tensor], d: int = D, f: int = FF, e: int = E) -> None:
        super().__init__()
        self.mix, self.router = mix, nn.Linear(d, e, bias=False)
        self.up = nn.Parameter(torch.randn(e, d, 2 * f) * d**-0.5)
        self.down = nn.Parameter(torch.randn(e, f, d) * f**-0.5)

    def forward(self, x_ND, experts_NK):
        weights_NK = self.router(x_ND).softmax(-1).gather(-1, experts_NK)
        return self.mix(x_ND, weights_NK, experts_NK, self.up, self.down)


def routed(tokens: int, groups: int = E) -> torch.Tensor:
    """K different experts for each token; nobody wants the last one."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.stack([torch.randperm(groups - 1, generator=generator)[:K] for _ in range(tokens)])


def gated(hidden):
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


def ends_of_groups(keys, groups):
    """Where the rows of each group end. On a CPU a histogram takes floating-point values only."""
    counts = torch.histc(keys.float() if keys.device.type == "cpu" else keys.int(), groups, 0, groups - 1)
    return counts.cumsum(0).to(torch.int32)


def grouped(rows, matrices, ends):
    """The rows of each group times its matrix; in float64, which no grouped product takes, one group at a time."""
    if rows.dtype != torch.float64:
        return F.grouped_mm(rows, matrices, offs=ends)
    return torch.cat([part @ matrix for part, matrix in zip(rows.tensor_split(ends.tolist()), matrices, strict=False)])


def sorted_and_brought_back(x, weights, experts, up, down):
    """Sorted by expert, multiplied group by group, brought back by the inverse order, added up over K."""
    keys, order = torch.sort(experts.reshape(-1))
    ends = ends_of_groups(keys, up.shape[0])
    rows = grouped(x[order // K], up, ends)
    rows = grouped(gated(rows), down, ends) * weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=x.device)
    return rows[inverse].view(*x.shape[:-1], K, -1).sum(-2)


def added_by_index(x, weights, experts, up, down):
    """Sorted by a stable argsort, added to the tokens in place; the counts come from the keys as they are."""
    order = experts.view(-1).argsort(stable=True)
    ends, tokens = ends_of_groups(experts.view(-1), up.shape[0]), order // K
    rows = grouped(gated(grouped(x[tokens], up, ends)), down, ends)
    result = torch.zeros_like(x)
    result.index_add_(0, tokens, rows * weights.view(-1)[order, None])
    return result


def gathered_and_scattered(x, weights, experts, up, down):
    """Rows by gather, added by scatter_add; the inverse is not needed."""
    order = torch.argsort(experts.view(-1))
    ends = ends_of_groups(experts.view(-1), up.shape[0])
    tokens = (order // K).reshape(-1, 1).expand(-1, x.shape[1])
    rows = torch.gather(x, 0, tokens) * weights.view(-1)[order].reshape(-1, 1)
    rows = grouped(gated(grouped(rows, up, ends)), down, ends)
    return torch.zeros_like(x).scatter_add(0, tokens, rows)


def inverse_by_argsort(x, weights, experts, up, down):
    """As the first one, with another inverse and a bias that each row takes by its expert."""
    keys, order = experts.reshape(-1).sort()
    ends = ends_of_groups(keys, up.shape[0])
    rows = grouped(x[order // K], up, ends) + up[:, 0][keys]
    rows = grouped(gated(rows), down, ends)[order.argsort()]
    return (rows.view(-1, K, x.shape[1]) * weights.unsqueeze(-1)).sum(1)


def written_back(x, weights, experts, up, down):
    """Rows are written to where they came from, and added up by a product with the weights of each token."""
    order = experts.view(-1).argsort(stable=True)
    ends = ends_of_groups(experts.view(-1), up.shape[0])
    rows = torch.zeros((order.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    rows[order] = grouped(gated(grouped(x[order // K], up, ends)), down, ends)
    return torch.bmm(weights.unsqueeze(1), rows.view(-1, K, x.shape[1])).squeeze(1)


def one_matrix_a_row(x, weights, experts, up, down):
    """Each pair of a token and an expert multiplies by its own copy of the matrices."""
    chosen = experts.reshape(-1)
    rows = x.repeat_interleave(K, dim=0).unsqueeze(1)
    rows = torch.bmm(gated(torch.bmm(rows, up[chosen])), down[chosen]).squeeze(1)
    return (rows * weights.reshape(-1, 1)).view(-1, K, x.shape[1]).sum(1)


def every_expert_on_every_token(x, weights, experts, up, down):
    """Tokens repeated for all experts, with a weight of 0 where they are not wanted."""
    share = torch.zeros(x.shape[0], up.shape[0], dtype=x.dtype, device=x.device).scatter(1, experts, weights)
    rows = x.repeat(up.shape[0], 1).view(up.shape[0], -1, x.shape[1])
    rows = torch.bmm(gated(torch.bmm(rows, up)), down)
    return (rows * share.t().unsqueeze(-1)).sum(0)


def einsum(x, weights, experts, up, down):
    """The same by einsum."""
    share = torch.zeros(x.shape[0], up.shape[0], dtype=x.dtype, device=x.device).scatter(1, experts, weights)
    rows = torch.einsum("enf,efd->end", gated(torch.einsum("nd,edf->enf", x, up)), down)
    return torch.einsum("end,ne->nd", rows, share)


GROUPED = (sorted_and_brought_back, added_by_index, gathered_and_scattered, inverse_by_argsort, written_back)
DENSE = (one_matrix_a_row, every_expert_on_every_token, einsum)
FORMS = {form.__name__: form for form in (*GROUPED, *DENSE)}
