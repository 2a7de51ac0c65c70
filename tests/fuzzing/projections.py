"""Streams, projections, MLPs and experts."""

from __future__ import annotations

from fuzzing.drawer import Drawer

ACTIVATIONS = (
    "F.gelu({})", "F.silu({})", "{}.relu()", "{}.tanh()", "{}.sigmoid()", "F.softplus({})", "{}.square()", "{}.sin()",
    "F.gelu({}, approximate='tanh')", "F.leaky_relu({}, 0.1)", "F.elu({})", "F.relu({}).square()", "F.hardswish({})",
    "F.mish({})",
    "F.dropout({}, 0.0)", "F.dropout({}, 0.3, training=False)", "({} * 3).clamp(-1, 1)", "{}.abs()", "F.selu({})",
)  # fmt: skip

# how often, of which rank (0: any), and how; {x} [.., D] times {w} [D, out], or {t} [out, D], plus {b} [out];
# {a} [D, 2] and {c} [2, out] are an adapter's, {n} and {m} the first two sizes
WAYS = (
    (40, 0, "{x} @ {w}", ""),
    (8, 0, "F.linear({x}, {t})", ""),
    (8, 0, "F.linear({x}, {t}, {b})", ""),
    (7, 0, "torch.einsum('...d,df->...f', {x}, {w})", ""),
    (6, 2, "torch.addmm({b}, {x}, {w})", ""),
    (3, 0, "F.linear({x}, {t}) + {x} @ {a} @ {c} * 0.5", "adapter"),
    (3, 0, "F.linear({x}, {t}) + {x} @ {a} @ {c} * 2", "adapter"),
    (6, 0, "F.layer_norm({x}, ({D},)) @ {w}", ""),
    (3, 0, "checkpoint(F.linear, {x}, {t}, use_reentrant=False)", "checkpoint"),
    (7, 3, "({x}.flatten(0, 1) @ {w}).unflatten(0, ({n}, {m}))", ""),
    (3, 3, "F.conv1d({x}.transpose(1, 2), {t}[..., None], {b}).transpose(1, 2)", "convolution"),
    (8, 4, "F.conv2d({x}.movedim(-1, 1), {t}[..., None, None]).movedim(1, -1)", "convolution"),
    (4, 0, "Product.apply({x}, {w})", "own gradients"),
    (3, 0, "({t} @ {x}.transpose(-1, -2)).transpose(-1, -2)", "channels first"),
    (6, 0, "torch.matmul({x}, {w}) + {b}", ""),
)

OPENED = (
    "checkpoint(F.silu, {}, use_reentrant=False)", "Square.apply({})", "StraightThrough.apply({})",
    "Scaled.apply({}.tanh(), -0.5)", "Clipped.apply({}, 0.2)",
)  # fmt: skip

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
    ways = [way for way in WAYS if way[1] in (0, len(g.shape(x)))]
    ((_, _, template, own_tag),) = g.random.choices(ways, [way[0] for way in ways])
    sizes = {"w": (D, out), "t": (out, D), "b": (out,), "a": (D, 2), "c": (2, out)}
    wanted = [key for key in sizes if f"{{{key}}}" in template]
    weights = {key: g.weight(*sizes[key]) for key in wanted}
    text = template.replace("{x}", x).replace("{D}", str(D))
    if "{n}" in text:
        text = text.replace("{n}", g.size(x, 0)).replace("{m}", g.size(x, 1))
    for key, name in weights.items():
        text = text.replace(f"{{{key}}}", name)
    return g.let(text, own_tag or tag)


def activated(g: Drawer, h: str) -> str | None:
    if g.chance(0.08):
        return g.let(g.choice(OPENED).format(h), "graph inside")
    if g.chance(0.02):
        return g.let(f"RowScaled.apply({h}, {g.weight(g.shape(h)[-1])})", "own gradients")
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
