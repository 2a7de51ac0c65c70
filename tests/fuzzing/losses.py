"""Heads, with losses and metrics as the tables of templates have them."""

from __future__ import annotations

import re

from fuzzing.drawer import Drawer
from fuzzing.loss_tables import LOSSES, METRICS
from fuzzing.projections import normed, projected
from fuzzing.wide import wide_steps

OFTEN = {"cross entropy": 6, "picked": 3, "shifted": 6, "statistic": 2, "pieces": 3, "checkpointed": 2}  # others once


def head(g: Drawer, x: str) -> None:
    """Logits, perhaps changed, with one to three losses or metrics of them."""
    V = g.choice((5, 8, 12, 24))
    if g.chance(0.3):
        x = normed(g, x)
    logits = projected(g, x, V, "head")
    if logits is None:
        return
    logits = wide_steps(g, logits, (0, 0, 0, 0, 0, 1, 1) if g.small else (0, 0, 0, 0, 1, 1, 2))
    if len(g.shape(logits)) < 2 or not g.token_dims(logits):
        return
    labels = _labels(g, logits)
    for count in range(g.choice((1, 1, 1, 2) if g.small else (1, 1, 2, 3))):
        table = METRICS if count and g.chance(0.5) else LOSSES
        for _ in range(4):
            tag = g.weighted(table, OFTEN)
            if loss := _loss(g, logits, labels, g.choice(table[tag]), tag):
                g.kept.append(loss)
                break
    if g.chance(0.08):
        g.kept.append(logits)


def _labels(g: Drawer, logits: str) -> str:
    V = g.shape(logits)[-1]
    return g.given("y", f"indices({V}, {', '.join(g.sizes(logits)[:-1])})")


def _loss(g: Drawer, logits: str, labels: str, template: str, tag: str) -> str | None:
    V = g.shape(logits)[-1]
    flat = logits if len(g.shape(logits)) == 2 else f"{logits}.{g.choice(('flatten(0, -2)', f'reshape(-1, {V})'))}"
    names = {"l": logits, "f": flat, "y": f"{labels}.flatten()", "Y": labels, "V": str(V), "m": f"({labels} > 0)"}
    for key in set(re.findall(r"{(\w)}", template)) - set(names):
        names[key] = _value(g, key, logits)
    return g.let(template.format(**names), tag)


def _value(g: Drawer, key: str, logits: str) -> str:
    V = g.shape(logits)[-1]
    if key == "c":
        return g.given("c", f"normal({V}, grad=False).abs() + 0.1")
    if key == "n":
        return g.number(1, 3)
    if key == "r":
        return g.number(0, 2, whole=False)
    return f"(torch.arange({V}, dtype=D) + {logits}.detach()).softmax(-1)"
