"""Streams, projections, MLPs and experts."""

from __future__ import annotations

from fuzzing.drawer import Drawer

ACTIVATIONS = (
    "F.gelu({})", "F.silu({})", "{}.relu()", "{}.tanh()", "{}.sigmoid()", "F.softplus({})", "{}.square()", "{}.sin()",
    "F.gelu({}, approximate='tanh')", "F.leaky_relu({}, 0.1)", "F.elu({})", "F.relu({}).square()", "F.hardswish({})",
    "F.mish({})",
    "F.dropout({}, 0.0)", "F.dropout({}, 0.3, training=False)", "({} * 3).clamp(-1, 1)", "{}.abs()", "F.selu({})",
)  # fmt: skip

OPENED = ("checkpoint(F.silu, {}, use_reentrant=False)", "Square.apply({})", "StraightThrough.apply({})")

STREAMS = (
    # what makes it, the dim of the tokens
    ("normal(2, T, {D})", "", 1),
    ("normal(3, T, {D})", "", 1),
    ("normal(1, T, {D})", "", 1),
    ("normal(T, {D})", "", 0),
    ("normal(T, 2, {D})", "", 0),
    ("normal(T, 2, {D})", "@.transpose(0, 1)", 1),
    ("normal(2, {D}, T)", "@.transpose(1, 2)", 1),
    ("normal(2, T, {D} + 2)", "@[..., 1:-1]", 1),
    ("normal(2, 2 * T, {D})", "@[:, ::2]", 1),
    ("normal(1, T, {D})", "@.expand(3, -1, -1)", 1),
    ("normal(2, 1, {D})", "@.expand(-1, T, -1)", 1),
    ("normal({D}, T)", "@.t()", 0),
    ("normal(2, 2, T, {D})", "", 2),
    ("normal(T, 2, 2, {D})", "@.permute(1, 2, 0, 3)", 2),
    ("normal(2, T, {D})", "@ * 1", 1),
    ("normal(2, T, {D}, grad=False)", "", 1),
)


def stream(g: Drawer) -> str:
    text, view, dim = g.choice(STREAMS[:5]) if g.chance(0.6) else g.choice(STREAMS)
    return g.given("x", text.replace("{D} + 2", str(g.D + 2)).replace("{D}", str(g.D)), view, "stream", dim)


def projected(g: Drawer, x: str, out: int, tag: str = "projection") -> str | None:
    """`x` [.., D] to [.., out], in one of the ways that people write it."""
    D = g.shape(x)[-1]
    how = g.random.random()
    if how < 0.4:
        text = f"{x} @ {g.weight(D, out)}"
    elif how < 0.55:
        bias = f", {g.weight(out)}" if g.chance(0.5) else ""
        text = f"F.linear({x}, {g.weight(out, D)}{bias})"
    elif how < 0.62:
        text = f"torch.einsum('...d,df->...f', {x}, {g.weight(D, out)})"
    elif how < 0.68 and len(g.shape(x)) == 2:
        text = f"torch.addmm({g.weight(out)}, {x}, {g.weight(D, out)})"
    elif how < 0.74:
        scale = g.choice(("0.5", "2"))
        text = f"F.linear({x}, {g.weight(out, D)}) + {x} @ {g.weight(D, 2)} @ {g.weight(2, out)} * {scale}"
        tag = "adapter"
    elif how < 0.80:
        text = f"F.layer_norm({x}, ({D},)) @ {g.weight(D, out)}"
    elif how < 0.815:
        text = f"checkpoint(F.linear, {x}, {g.weight(out, D)}, use_reentrant=False)"
        tag = "checkpoint"
    elif how < 0.90 and len(g.shape(x)) == 3:
        text = f"({x}.flatten(0, 1) @ {g.weight(D, out)}).unflatten(0, ({g.size(x, 0)}, {g.size(x, 1)}))"
    elif how < 0.94:
        text = f"({g.weight(out, D)} @ {x}.transpose(-1, -2)).transpose(-1, -2)"
        tag = "channels first"
    else:
        text = f"torch.matmul({x}, {g.weight(D, out)}) + {g.weight(out)}"
    return g.let(text, tag)


def activated(g: Drawer, h: str) -> str | None:
    if g.chance(0.05):
        return g.let(g.choice(OPENED).format(h), "graph inside")
    return g.let(g.choice(ACTIVATIONS).format(h), "activation")


def normed(g: Drawer, x: str) -> str:
    D = g.shape(x)[-1]
    how = g.choice(
        (
            f"F.layer_norm({x}, ({D},), {g.weight(D)}, {g.weight(D)})",
            f"{x} * torch.rsqrt({x}.square().mean(-1, keepdim=True) + 1e-5) * {g.weight(D)}",
            f"F.rms_norm({x}, ({D},), {g.weight(D)})",
        )
    )
    return g.let(how, "norm") or x


def widened(g: Drawer, x: str) -> str | None:
    """The wide value of an MLP: plain, gated, or of a fused projection that is cut in two."""
    if g.chance(0.08):
        h = embedded_wide(g, x)
        return h and (activated(g, h) if g.chance(0.5) else h)
    how = g.random.random()
    if how < 0.5:
        h = projected(g, x, g.F)
        return h and activated(g, h)
    if how < 0.75:
        gate, up = projected(g, x, g.F), projected(g, x, g.F)
        if gate is None or up is None:
            return None
        gate = activated(g, gate)
        return gate and g.let(f"{gate} * {up}", "gate")
    both = projected(g, x, 2 * g.F)
    if both is None:
        return None
    cut = g.choice(
        (
            "{}.chunk(2, -1)", f"{{}}.split({g.F}, -1)", "({0}[..., ::2], {0}[..., 1::2])", "{}.tensor_split(2, -1)",
            f"{{}}.unflatten(-1, (2, {g.F})).unbind(-2)", f"({{0}}[..., :{g.F}], {{0}}[..., {g.F}:])",
        )
    )  # fmt: skip
    a, b = g.name(), g.name()
    if not g.add(f"{a}, {b} = {cut.format(both)}", "cut in two"):
        return None
    a2 = activated(g, a)
    return a2 and g.let(f"{a2} * {b}", "gate")


def embedded_wide(g: Drawer, x: str) -> str | None:
    """A projection, often by a computed weight, beside an embedding."""
    if len(g.shape(x)) > 2 and g.chance(0.5):
        x = g.let(f"{x}.flatten(0, -2)", "flatten") or x
    D = g.shape(x)[-1]
    table = g.plain_weight(11, g.F)
    ids = g.given("i", f"indices(11, {', '.join(g.sizes(x)[:-1])})")
    w, scale = g.plain_weight(g.F, D), g.plain_weight(g.F, 1)
    rows = f"F.normalize({w}, dim=1)"
    computed = g.choice((f"{rows} * {scale}", f"{rows} * {scale}", f"{w} * {scale}", rows, w))
    return g.let(f"F.linear({x}, {computed}) + F.embedding({ids}, {table})", "wide embedding")


def two_downs(g: Drawer, h: str) -> str | None:
    """Two products by weights of the same shape, the other of less rows."""
    dim = g.random.randrange(len(g.shape(h)) - 1)
    fewer = g.choice((f"{h}.amax({dim}, keepdim=True)", f"{h}.mean({dim}, keepdim=True)", f"{h}.narrow({dim}, 0, 1)"))
    y = g.let(f"{h} @ {g.plain_weight(g.shape(h)[-1], g.D)}", "down")
    other = f"{fewer} @ {g.plain_weight(g.shape(h)[-1], g.D)}"
    if y is None or g.chance(0.6):
        return y if y and g.add(f"{y} += {other}", "down of fewer rows") else None
    return g.let(f"{y} + {other}", "down of fewer rows")


def narrowed(g: Drawer, h: str, x: str) -> str | None:
    """Down to the stream's width, sometimes with another down of the same wide value."""
    out = g.D
    if not isinstance(g.shape(h)[-1], int) or not g.token_dims(h):
        return None
    y = two_downs(g, h) if g.chance(0.05) else projected(g, h, out, "down")
    if y is None:
        return None
    g.kept.append(y)
    if g.chance(0.15):
        other = g.choice(
            (f"{h}.amax(-2, keepdim=True)", f"{h}[..., :1, :]", f"{h}.flip(-1)", f"{h}.detach()", f"{h}[..., ::2]")
        )
        z = g.let(other, "another down's operand")
        w = z and projected(g, z, out, "another down")
        if w:
            g.kept.append(w)
            if g.chance(0.5):
                g.add(f"{y} += {w}", "in place down")
    if g.shape(y) == g.shape(x) and g.chance(0.5):
        added = g.let(f"{x} + {y}", "residual")
        if added:
            g.kept[-1] = added
        y = added or y
    return y


def experts(g: Drawer, x: str) -> str | None:
    """Batched experts: each on every token, or each on the tokens that it chose."""
    tokens = x if len(g.shape(x)) == 2 else g.let(f"{x}.flatten(0, -2)", "flatten")
    if tokens is None:
        return None
    E, D = 3, g.shape(x)[-1]
    up, down, router = g.weight(E, D, g.F), g.weight(E, g.F, D), g.weight(D, E)
    scores = g.let(f"({tokens} @ {router}).softmax(-1)", "router")
    if scores is None:
        return None
    if g.chance(0.5):
        h = g.let(f"torch.einsum('td,edf->etf', {tokens}, {up})", "experts")
        h = h and activated(g, h)
        y = h and g.let(f"torch.bmm({h}, {down})", "experts")
        return y and g.let(f"torch.einsum('etd,te->td', {y}, {scores})", "experts")
    k = g.name()
    text = f"{k} = max({tokens}.shape[0] // 2, 1)\n"
    p, i, y, o = g.name(), g.name(), g.name(), g.name()
    text += f"{p}, {i} = {scores}.t().topk({k}, -1)\n"
    text += f"{y} = F.silu(torch.bmm({tokens}[{i}], {up})) @ {down} * {p}[..., None]\n"
    text += f"{o} = torch.zeros_like({tokens}).index_add(0, {i}.flatten(), {y}.flatten(0, 1))"
    return o if g.add(text, "experts that choose") else None
