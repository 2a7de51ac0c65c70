"""Steps on wide values, as the tables of templates have them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fuzzing.drawer import Drawer
from fuzzing.step_tables import FEATURES, TOKENS
from fuzzing.write_tables import MADE, NUMBERS, WRITES

OFTEN = {"elementwise": 5, "row": 4, "heads": 3, "views": 3, "cut": 2, "cat": 2, "bound": 2}  # others once
FAMILIES = ((FEATURES, 18), (TOKENS, 1), (NUMBERS, 5), (WRITES, 3), (MADE, 4))


def wide_steps(g: Drawer, h: str, counts: Sequence[int]) -> str:
    """Some steps on a wide value; the name of the last result."""
    for _ in range(1 if g.varies and g.chance(0.5) else g.choice(counts)):
        h = wide_step(g, h) or h
    return h


def wide_step(g: Drawer, h: str) -> str | None:
    """One step on a wide value; the name of its result."""
    weights = [w * (4 if g.varies and f is NUMBERS else 1) for f, w in FAMILIES]
    (family,) = g.random.choices([f for f, _ in FAMILIES], weights)
    tag = g.weighted(family, OFTEN)
    return filled(g, h, g.choice(family[tag]), tag)


def filled(g: Drawer, h: str, template: str, tag: str) -> str | None:
    """The template as a statement over `h`."""
    if not g.token_dims(h) or not g.runs[0][h].is_floating_point():
        return None
    if re.search(r"{[Hw]}|{F} //", template) and g.shape(h)[-1] % 4:
        return None
    names = {"h": h, "v": g.name(), "u": g.name()}
    wanted = set(re.findall(r"{(\w)}", template)) - set(names)
    text = template.format(**names, **{key: VALUES[key](g, h) for key in wanted})
    if tag in MADE:
        return names["v"] if g.add(text, tag) else None
    if tag in WRITES:
        return h if g.add(text, tag) else None
    return names["v"] if g.add(f"{names['v']} = {text}", tag) else None


def _mask(g: Drawer, h: str) -> str:
    return f"({h}[..., :1] > -0.4)" if g.chance(0.5) else f"(torch.arange({g.shape(h)[-1]}) % 3)"


def _size(g: Drawer, h: str) -> str:
    """A size that varies: of the value, or of what the program is given."""
    x = g.inputs[0]
    if g.chance(0.5) and x.kind == "stream" and x.mark is not None:
        return f"{x.name}.shape[{x.mark}]"
    return f"{h}.shape[{g.token_dims(h)[0]}]"


VALUES = {
    "F": lambda g, h: str(g.shape(h)[-1]),
    "H": lambda g, h: str(g.shape(h)[-1] // 2),
    "o": lambda g, h: g.choice(g.like(h)),
    "w": lambda g, h: g.weight(g.shape(h)[-1]),
    "n": lambda g, h: g.number(1, 4),
    "r": lambda g, h: g.number(0, 3, whole=False),
    "z": _size,
    "m": _mask,
    "i": lambda g, h: g.given("i", f"torch.randperm({g.shape(h)[-1]})"),
    "t": lambda g, h: str(g.token_dims(h)[0]),
}
