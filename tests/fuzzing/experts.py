"""Mixtures of experts: each on every token, each on the tokens that it chose, or each token by those that it chose."""

from __future__ import annotations

from fuzzing.drawer import Drawer
from fuzzing.projections import activated

E, K = 3, 2
# {k} the experts [tokens, K] that the tokens go to
COUNTS = (
    "torch.histc({k}.flatten().float(), 3, 0, 2)",
    "F.one_hot({k}, 3).sum((0, 1))",
    "F.one_hot({k}, 3).view(-1, 3).float().sum(0)",
    "F.one_hot({k}, 3).sum(0).sum(0)",
    "F.one_hot({k}, 3).permute(2, 0, 1).flatten(1).sum(1)",
    "torch.zeros({k}.shape[0], 3).scatter_(1, {k}, 1.0).sum(0)",
    "torch.zeros({k}.shape[0], 3, dtype=torch.bool).scatter(1, {k}, True).sum(0)",
    "torch.zeros({k}.shape[0], 3).scatter_add_(1, {k}, torch.ones({k}.shape)).sum(0)",
    "({k}.flatten()[:, None] == torch.arange(3)).sum(0)",
    "({k}[..., None] == torch.arange(3)).sum(0).int().sum(0)",
    "torch.stack([({k} == j).sum() for j in range(3)])",
    "torch.zeros(3, dtype=torch.long).scatter_add_(0, {k}.flatten(), torch.ones_like({k}.flatten()))",
    "torch.zeros(3).index_add_(0, {k}.flatten(), torch.ones({k}.numel()))",
    "torch.bincount({k}.flatten(), minlength=3)",
)
# {y} sorted rows, {p} their permutation, {x} the tokens of {d} features; {o} is the result
BROUGHT_BACK = (
    "{o} = torch.zeros_like({x}).index_add(0, {p} // 2, {y})",
    "{o} = {y}[{p}.argsort()].view(-1, 2, {d}).sum(1)",
    "{o} = torch.zeros({p}.shape[0], {d}, dtype=D)\n{o}[{p}] = {y}\n{o} = {o}.view(-1, 2, {d}).sum(1)",
    "{o} = torch.zeros({x}.shape, dtype=D)\n{o}.scatter_add_(0, ({p} // 2)[:, None].expand(-1, {d}), {y})",
)


def experts(g: Drawer, x: str) -> str | None:
    """Experts, in one of the ways that people write them."""
    tokens = x if len(g.shape(x)) == 2 else g.let(f"{x}.flatten(0, -2)", "flatten")
    if tokens is None:
        return None
    D = g.shape(x)[-1]
    up, down, router = g.weight(E, D, g.F), g.weight(E, g.F, D), g.weight(D, E)
    scores = g.let(f"({tokens} @ {router}).softmax(-1)", "router")
    if scores is None:
        return None
    how = g.random.random()
    if how < 0.4:
        return _sorted(g, tokens, scores)
    if how < 0.7:
        h = g.let(f"torch.einsum('td,edf->etf', {tokens}, {up})", "experts")
        h = h and activated(g, h)
        y = h and g.let(f"torch.bmm({h}, {down})", "experts")
        return y and g.let(f"torch.einsum('etd,te->td', {y}, {scores})", "experts")
    return _choosing(g, tokens, scores, up, down)


def _choosing(g: Drawer, tokens: str, scores: str, up: str, down: str) -> str | None:
    k, p, i, y, o = (g.name() for _ in range(5))
    text = f"{k} = max({tokens}.shape[0] // 2, 1)\n"
    text += f"{p}, {i} = {scores}.t().topk({k}, -1)\n"
    text += f"{y} = F.silu(torch.bmm({tokens}[{i}], {up})) @ {down} * {p}[..., None]\n"
    text += f"{o} = torch.zeros_like({tokens}).index_add(0, {i}.flatten(), {y}.flatten(0, 1))"
    return o if g.add(text, "experts that choose") else None


def _sorted(g: Drawer, tokens: str, scores: str) -> str | None:
    """Rows sorted by expert and multiplied group by group, which torch does in bfloat16 and rows of 8 numbers alone."""
    s, k, p, c, e, h, y, o = (g.name() for _ in range(8))
    D, up, down = g.shape(tokens)[-1], g.weight(E, 8, 16), g.weight(E, 16, 8)
    text = f"{s}, {k} = {scores}.topk(2, -1)\n{p} = {k}.flatten().argsort(stable=True)\n"
    text += f"{c} = {g.choice(COUNTS).format(k=k)}\n{e} = {c}.cumsum(0).to(torch.int32)\n"
    text += f"{h} = F.pad({tokens}, (0, {8 - D}))[{p} // 2].bfloat16()\n"
    text += f"{h} = F.silu(torch._grouped_mm({h}, {up}.bfloat16(), offs={e}))\n"
    text += f"{y} = torch._grouped_mm({h}, {down}.bfloat16(), offs={e}).double()[:, :{D}] * {s}.flatten()[{p}, None]\n"
    text += g.choice(BROUGHT_BACK).format(o=o, x=tokens, p=p, y=y, d=D)
    if not g.add(text, "experts sorted"):
        return None
    if g.chance(0.2):
        n = g.name()
        if g.add(f"{n} = torch.zeros(3)\nwith torch.no_grad():\n    {n}.add_({c})", "counter"):
            g.kept.append(n)
    return o
