"""Alike MLPs side by side, whose wide values have other users: those bring upstream gradients of other strides."""

from __future__ import annotations

from fuzzing.drawer import Drawer
from fuzzing.projections import ACTIVATIONS

# {h} the wide value [.., F], {q} numbers of its tokens [.., 3], {m} a weight [F, 5], {d} the dims of tokens
STACKED = "({h}[..., None] * {q}[..., None, :]).sum({d})"
OTHERS = (
    "torch.einsum('...f,...q->fq', {h}, {q}).t().tanh()",
    "({h}.transpose(-1, -2).contiguous() * 2).tanh()",
    "({h}.transpose(-1, -2) @ {q}).square().sum()",
    "{h}.unflatten(-1, (2, -1)).sum({d}).t().tanh()",
)
USERS = (f"({STACKED}.t().contiguous() @ {{m}}).square().sum()", f"{STACKED}.square().sum()") * 4 + OTHERS


def twins(g: Drawer, x: str) -> None:
    """Two MLPs, of a value and of another one of its shape."""
    sizes = ", ".join(g.sizes(x))
    z = g.given("x", f"normal({sizes})", kind="stream", mark=g.token_dims(x)[0])
    D = g.shape(x)[-1]
    dims = ", ".join(map(str, range(len(g.shape(x)) - 1)))
    activation = g.choice(ACTIVATIONS)
    for value in (x, z):
        wide = g.let(f"{value} @ {g.plain_weight(D, g.F)}", "projection")
        wide = wide and g.let(activation.format(wide), "activation")
        if wide is None:
            return
        down = g.let(f"{wide} @ {g.plain_weight(g.F, D)}", "down")
        g.kept += [down] if down else []
        rows = g.given("q", f"normal({', '.join(g.sizes(x)[:-1])}, 3)", kind="stream", mark=g.token_dims(x)[0])
        names = {"h": wide, "d": f"({dims},)", "q": rows, "m": g.plain_weight(g.F, 5)}
        user = g.let(g.choice(USERS).format(**names), "user of a wide value")
        g.kept += [user] if user else []
