"""Steps on wide values: views, cuts, joins, picks along features and along tokens, numbers, writes in place.

A template stands for a statement: {h} is the value, {F} its features and {H} half of them, {o} another value of its shape,
{w} a weight of its features, {n} a whole number and {r} a fraction that vary from call to call, {z} a size that does,
{m} a mask of its tokens, {i} indices of features, {t} its first dim of tokens. A template with a "=" or a ":" is a statement that
changes {h}; others are expressions whose value is the result.
"""

from __future__ import annotations

import re

from fuzzing.drawer import Drawer

FEATURES = {
    "flip": ("{h}.flip(-1)", "{h} + {h}.flip(-1)"),
    "roll": ("{h}.roll(1, -1)", "{h} * {h}.roll(({F} // 2), -1)"),
    "pad": ("F.pad({h}[..., 1:], (0, 1))", "F.pad({h}, (1, 0))[..., :-1]", "F.pad({h}[..., :-2], (1, 1), value=0.5)"),
    "cat": (
        "torch.cat([{h}[..., {H}:], {h}[..., :{H}]], -1)", "torch.cat([{h}, {o}], -1)[..., {H}:-{H}]",
        "torch.cat([torch.zeros_like({h}[..., :1]), {h}[..., :-1]], -1)",
        "torch.cat((-{h}[..., 1::2], {h}[..., ::2]), dim=-1)",
    ),
    "stack": ("torch.stack([{h}[..., ::2], {h}[..., 1::2]], -1).flatten(-2)", "torch.stack([{h}, {o}]).mean(0)",
              "torch.stack([{h}, {o}], -2)[..., 0, :]"),
    "cut": ("{h}.chunk(2, -1)[0].repeat_interleave(2, -1)", "{h}.narrow(-1, 0, {H}).repeat(*([1] * ({h}.dim() - 1)), 2)",
            "torch.cat({h}.split([{H}, {H}], -1)[::-1], -1)", "torch.cat({h}.unbind(-1)[:2], 0).sum() + {h}"),
    "heads": (
        "{h}.unflatten(-1, (2, -1)).softmax(-1).flatten(-2)", "{h}.view(*{h}.shape[:-1], 2, {H}).transpose(-1, -2).reshape({h}.shape)",
        "{h}.unflatten(-1, ({H}, 2)).sum(-1, keepdim=True).expand(*{h}.shape[:-1], {H}, 2).flatten(-2)",
        "F.normalize({h}.unflatten(-1, (2, {H})), dim=-1).flatten(-2)", "({h}.unflatten(-1, (2, {H})) * {w}.view(2, -1)).flatten(-2)",
    ),
    "views": (
        "{h}.transpose(-1, -2).tanh().transpose(-1, -2)", "{h}.movedim(-1, 0).contiguous().movedim(0, -1)", "{h}.unsqueeze(0).squeeze(0)",
        "{h}.reshape(-1, {F}).sin().view({h}.shape)", "{h}.transpose(0, -1).contiguous().transpose(0, -1)", "{h}.unsqueeze(-2).squeeze(-2) * 2",
        "{h}.flatten(0, -2).cos().view_as({h})", "{h}.contiguous()", "{h}.mT.clone().mT", "{h}.swapaxes(-1, -2).relu().swapaxes(-2, -1)",
        "F.instance_norm({h}.transpose(-1, -2)).transpose(-1, -2)", "{h}.as_strided({h}.shape, {h}.stride())",
    ),
    "gather": (
        "{h}.gather(-1, {h}.argsort(-1))", "{h}.index_select(-1, {i})", "{h}[..., {i}]", "{h}.take_along_dim({h}.argmax(-1, keepdim=True), -1) + {h}",
        "{h}.gather(-1, {i}.expand_as({h}))",
    ),
    "scatter": (
        "torch.zeros_like({h}).scatter(-1, {h}.argsort(-1), {h})", "{h}.index_add(-1, {i}, {o})", "{h}.scatter_add(-1, {i}.expand_as({h}), {o})",
        "{h}.index_copy(-1, torch.arange({H}), {o}[..., :{H}])", "torch.zeros_like({h}).scatter_(-1, {h}.topk(2, -1)[1], 1.0) * {h}",
        "{h}.index_fill(-1, torch.tensor([0, 2]), 0.5)", "{h}.slice_scatter({o}[..., :2], -1, 0, 2)", "{h}.select_scatter({o}[..., 1], -1, 0)",
    ),
    "sort": (
        "{h}.sort(-1)[0]", "{h}.sort(-1, descending=True).values.cumsum(-1)", "{h}.topk(3, -1)[0].sum(-1, keepdim=True) * {h}",
        "{h}.masked_fill({h} < {h}.topk(2, -1)[0][..., -1:], 0.0)", "{h}.kthvalue(2, -1, keepdim=True)[0] - {h}",
        "{h} - {h}.median(-1, keepdim=True)[0]", "{h} * ({h}.argsort(-1) > 2)",
    ),
    "scan": ("{h}.cumsum(-1)", "{h}.tanh().cumprod(-1)", "{h}.logcumsumexp(-1)", "{h}.cummax(-1)[0]", "{h}.diff(dim=-1, prepend={h}[..., :1])"),
    "row": (
        "{h}.softmax(-1)", "{h} - {h}.mean(-1, keepdim=True)", "{h} - {h}.amax(-1, keepdim=True)", "{h} / ({h}.norm(dim=-1, keepdim=True) + 1)",
        "F.layer_norm({h}, ({F},), {w})", "{h} * {h}.std(-1, keepdim=True)", "{h}.log_softmax(-1)", "F.normalize({h}, dim=-1)", "{h}.argmax(-1, keepdim=True) + {h}",
    ),
    "elementwise": (
        "{h} * {o}", "{h} + {w}", "torch.where({h} > 0, {h}, {o})", "{h} * {m}", "{h}.masked_fill({m} == 0, -1.0)", "3 * torch.tanh({h} / 3)",
        "torch.addcmul({h}, {h}, {o}, value=0.3)", "torch.lerp({h}, {o}, 0.4)", "torch.maximum({h}, {o} * 2)", "{h}.pow(2) - {h}", "{h} * {h}.detach()",
        "{h}.float().double()", "({h}.to(torch.float32) * 2).to(D)", "{h}.clamp_min(-0.5)", "torch.add({h}, {o}, alpha=2)", "{h}.reciprocal().clamp(-2, 2)",
        "F.glu(torch.cat([{h}, {o}], -1), -1)", "torch.complex({h}, {o}).abs()", "{h}.type(torch.float32).type_as({h})", "torch.heaviside({h}, {o}.detach()) * {o}",
    ),
}  # fmt: skip
TOKENS = {
    "cut tokens": (
        "{h}.narrow({t}, 1, {z} - 1)", "{h}.narrow({t}, 0, max({z} - 1, 1))", "{h}.select({t}, 0)", "{h}.narrow({t}, 0, {z} // 2 + 1)", "{h}[..., ::2, :]",
        "{h}[..., -1:, :]", "{h}[..., :{n}, :]", "{h}[..., {n}:, :]", "torch.cat({h}.split(2, {t})[::-1], {t})", "torch.cat({h}.chunk(2, {t}), {t})",
        "{h}[..., 1:, :] - {h}[..., :-1, :]", "{h}[0]", "{h}[-1:]", "torch.cat([{h}[:1], {h}[1:]])", "torch.stack({h}.unbind(0))",
    ),
    "mix tokens": (
        "{h}.roll(1, {t})", "{h}.roll({n}, {t})", "{h}.flip({t})", "{h} - {h}.mean({t}, keepdim=True)", "{h}.softmax({t})", "{h}.cumsum({t})",
        "{h} / {h}.abs().amax()", "{h}.index_select({t}, torch.arange({z}).flip(0))", "{h} * {h}.norm()", "{h} * {h}.sum({t}, keepdim=True).sigmoid()",
        "{h} + {h}.flatten().sort()[0][0]", "{h}.index_add({t}, torch.zeros({z}, dtype=torch.long), {h})", "{h} * ({h} > {h}.detach().mean())",
        "{h} - torch.quantile({h}.detach(), 0.5)", "{h}.clamp(max={h}.detach().max() / 2)", "{h}.repeat_interleave(2, 0)", "torch.cat([{h}, {o}], 0)",
        "F.pad({h}, (0, 0, 1, 0))", "torch.cat([{h}, {o} * 2], {t})", "{h}[torch.randperm(2) % 1]", "{h}.index_select({t}, torch.arange({z} // 2 + 1))",
    ),
}  # fmt: skip
NUMBERS = {
    "number of an op": (
        "{h}.clamp(-1, {n})", "{h}.clamp({r} - 8, {r})", "torch.add({h}, {o}, alpha={n})", "torch.sub({h}, {o}, alpha={r})", "{h}.masked_fill({h} > 0, {n})",
        "{h}.masked_fill({h} > 0, {r})", "{h} * {n}", "{h} * {r}", "{h} ** {n}", "{h}.sigmoid() ** {r}", "{h}.roll({n}, -1)", "{h} * (torch.arange({F}) < {n})",
        "{h}.topk({n}, -1)[0].sum(-1, keepdim=True) + {h}", "F.layer_norm({h}, ({F},), eps={r})", "F.leaky_relu({h}, {r})", "{h} / {n} + {r}", "F.elu({h}, alpha={r})",
        "{h} * ({n} > 3)", "F.softplus({h}, beta={r})", "{h}.index_fill(-1, torch.tensor([1]), {r})", "F.pad({h}[..., 1:], (0, 1), value={n})", "torch.full_like({h}, {r}) * {h}",
        "F.threshold({h}, {r} - 3, {n})", "torch.addcmul({h}, {h}, {o}, value={n})", "F.hardtanh({h}, -{n}, {n})", "{h}.narrow(-1, 0, {n}).sum(-1, keepdim=True) * {h}",
        "torch.lerp({h}, {o}, {r})", "F.celu({h}, {r})", "{h}[..., {n} - 1:{n}] * {h}", "{h}.select(-1, {n} - 1)[..., None] + {h}", "{h}.norm({n}, -1, keepdim=True) * {h}",
        "F.normalize({h}, p=2, dim=-1, eps={r})", "torch.where({h} > 0, {h}, {n})", "torch.where({h} > 0, {h}, {r})", "{h}.remainder({n})", "{h} * max({n}, 3)", "{h} + int({r})",
    ),
    "size of an op": (
        "{h}.clamp(-1, {z} - 3)", "{h}.masked_fill({h} > 0, {z})", "{h} * {z}", "{h} / {z} ** 0.5", "torch.add({h}, {o}, alpha={z})", "{h}.clamp(max={z} / 4)", "{h} + torch.arange({z}).sum()",
        "{h} * (1 / {z})", "{h} - float({z})", "F.leaky_relu({h}, 1 / {z})", "{h} * (torch.arange({F}) < {z})", "{h}.roll({z}, -1)", "{h}.sigmoid() ** {z}", "{h} * min({z}, 5)",
        "torch.full_like({h}, {z}) + {h}", "torch.where({h} > 0, {h}, {z})", "{h} * {h}.numel()", "{h} + torch.arange({z}).view(-1, 1)", "{h} * {n} * {z}", "{h}.clamp(-{n}, {n} * {z})",
        "F.hardtanh({h}, -1, {z} - 0.5)", "{h} + torch.ones({z}, 1)", "torch.addcmul({h}, {h}, {o}, value=1 / {z})", "{h} * ({z} % 2)", "{h} * ({z} - {n})", "F.pad({h}[..., 1:], (0, 1), value={z})",
    ),
}  # fmt: skip
WRITES = {
    "write": (
        "{h} += {o}", "{h}.mul_(1.5)", "{h}[..., :{H}] = {o}[..., {H}:]", "{h}[..., 0] = 0", "{h}.masked_fill_({m} == 0, 0.5)", "{h}.zero_()", "{h}.copy_({o} * 2)", "{h}.add_({w})",
        "{h}[..., ::2] *= 2", "{h}[..., 0::2], {h}[..., 1::2] = {o}[..., 1::2], -{o}[..., 0::2]", "{h}.clamp_(-1, 1)", "{h}[..., 1:] += {h}[..., :-1].detach()", "{h}[{m}[..., 0] == 0] = 0",
        "{h}.view(-1)[:2] = 0.25", "{h}.flatten(0, -2)[:, 1].mul_(3)", "{h}.transpose(-1, -2)[..., :1] *= 2", "{h}[..., {i}] = {o}[..., {i}] * 2", "{h}.index_fill_(-1, {i}[:1], 0.0)",
        "{h}.scatter_(-1, {h}.argmax(-1, keepdim=True), 0.5)", "{h}.add_({o}, alpha=2)", "{h}.unsqueeze(0).mul_(2)", "{h}.fill_(0.5)", "{h}[..., :1, :] *= 2", "{h}.clamp_(max={z})", "{h}.mul_({n})",
        "{h}.relu_()", "F.silu({h}, inplace=True)", "{h}.tanh_()", "{h}[..., -1] += {h}[..., 0]", "{h}.chunk(2, -1)[1].mul_(2)", "{h}.unbind(-1)[0].add_(1)", "{h}.t_().sin_().t_()", "{h}.index_add_(-1, {i}, {o})",
    ),
    "write without gradient": (
        "with torch.no_grad():\n    {h} -= {h}.amax(-1, keepdim=True)", "with torch.no_grad():\n    {h}.mul_(1.5)", "{h}.detach().mul_(2)", "{h}.data.add_(1)", "with torch.no_grad():\n    {h}.zero_()",
        "with torch.no_grad():\n    {h}[..., :{H}] = {o}[..., {H}:]", "{h}.detach()[..., 0] = 0.5", "with torch.no_grad():\n    {h}.masked_fill_({m} == 0, 0.5)", "with torch.no_grad():\n    {h}.copy_({o})",
        "with torch.no_grad():\n    {h}.clamp_(-1, 1)", "{h}.data[..., ::2] *= 2", "{h}.data = {h}.data * 2", "with torch.no_grad():\n    with torch.enable_grad():\n        {h}.mul_(2)", "{h}.detach().copy_({o})",
        "with torch.no_grad():\n    {h}.view(-1)[:3] = 1", "with torch.no_grad():\n    {h} /= {h}.norm(dim=-1, keepdim=True) + 1", "with torch.no_grad():\n    {h}.flatten(0, -2).mul_(2)", "{h}.detach_()",
        "with torch.no_grad():\n    torch.mul({h}, 2, out={h})", "with torch.inference_mode(False):\n    {h}.mul_(2)", "torch.nn.init.zeros_({h})", "{h}.detach().unflatten(-1, (2, -1))[..., 0, :].zero_()",
    ),
}  # fmt: skip
MADE = {  # several lines; {v} is the result, {u} a name between
    "buffer": (
        "{v} = torch.empty_like({h})\n{v}[..., 0::2], {v}[..., 1::2] = {h}[..., 1::2], -{h}[..., 0::2]", "{v} = torch.zeros_like({h})\n{v} += {h}", "{v} = {h}.new_zeros({h}.shape)\n{v}[..., :{H}] = {h}[..., {H}:]",
        "with torch.no_grad():\n    {v} = torch.zeros_like({h})\n{v}[..., 1:] = {h}[..., :-1]", "with torch.no_grad():\n    {v} = torch.empty_like({h})\n{v}.copy_({h})", "{v} = {h}.clone()\n{v}[..., 0] = 0",
        "{v} = torch.empty_like({h})\nwith torch.no_grad():\n    torch.mul({h}, 2, out={v})\n{v} = {v} * {h}", "{v} = torch.zeros({h}.shape, dtype=D)\n{v}.add_({h})", "{v} = torch.ones_like({h})\n{v}.mul_({h}).add_(1)",
        "{v} = {h}.clone()\n{v}.narrow({t}, 0, 1).zero_()", "{v} = torch.empty_like({h})\n{v}[:] = {h} * 2", "{u} = {h}.view(-1, {F})\n{u} *= 2\n{v} = {h} + 1", "{v} = {h} * 1\n{u} = {v}[..., :2]\n{u}.mul_(3)",
        "{v} = torch.empty({h}.shape, dtype=D)\nfor k in range({F}):\n    {v}[..., k] = {h}[..., k] * (k + 1)",
    ),
    "grad mode": (
        "with torch.no_grad():\n    {u} = {h}.amax(-1, keepdim=True)\n{v} = {h} - {u}", "with torch.no_grad():\n    {u} = {h} * 2\n    with torch.enable_grad():\n        {v} = {h} * {u}",
        "with torch.no_grad():\n    {u} = {h}.softmax(-1)\n{v} = {h} * {u}", "{u} = {h}.detach()\n{v} = {h} + {u} * 2", "{v} = {h} + ({h}.tanh() - {h}).detach()", "with torch.set_grad_enabled(False):\n    {u} = {h} > 0\n{v} = {h} * {u}",
        "with torch.no_grad():\n    {u} = {h}.clone()\n    {u}.mul_(2)\n{v} = {h} * {u}",
    ),
    "tuple": (
        "{u}, {v} = {h}.max(-1, keepdim=True)\n{v} = {h} - {u} + {v}", "{u}, {v} = {h}.chunk(2, -1)\n{v} = torch.cat([{v}, {u}], -1)", "{u} = {h}.split(({F} // 4), -1)\n{v} = {h} * {u}[0].sum(-1, keepdim=True) + {u}[-1].mean()",
        "{u} = {h}.unbind(-1)\n{v} = torch.stack(({u}[1], *{u}[1:]), -1)", "{u} = {h}.sort(-1)\n{v} = {u}.values * ({u}.indices > 1)", "{u} = torch.var_mean({h}, -1, keepdim=True)\n{v} = ({h} - {u}[1]) * torch.rsqrt({u}[0] + 1e-3)",
        "{u} = torch.aminmax({h}, dim=-1, keepdim=True)\n{v} = {h} - {u}.min + {u}.max", "{u} = [{h} * k for k in (1, 2)]\n{v} = sum({u})",
    ),
}  # fmt: skip
FAMILIES = ((FEATURES, 8), (TOKENS, 2), (NUMBERS, 4), (WRITES, 4), (MADE, 3))


def wide_step(g: Drawer, h: str) -> str | None:
    """One step on a wide value; the name of its result."""
    (family,) = g.random.choices([f for f, _ in FAMILIES], [w for _, w in FAMILIES])
    tag = g.choice(list(family))
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
