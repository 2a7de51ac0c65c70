"""Templates of numbers, and of writes in place, by kind.

{h} is the value, {F} its features and {H} half of them, {o} another value of its shape, {w} a weight of its features,
{n} a whole number and {r} a fraction that vary from call to call, {z} a size that does, {m} a mask of its tokens,
{i} a permutation of its features, {t} its first dim of tokens; {v} is the result and {u} a name between, where a
template has several statements.
"""

from __future__ import annotations

# numbers that an op takes, which differ from call to call
NUMBERS = {
    "number of an op": (
        "{h}.clamp(-1, {n})", "{h}.clamp({r} - 8, {r})", "torch.add({h}, {o}, alpha={n})",
        "torch.sub({h}, {o}, alpha={r})", "{h}.masked_fill({h} > 0, {n})", "{h}.masked_fill({h} > 0, {r})", "{h} * {n}",
        "{h} * {r}", "{h} ** {n}", "{h}.sigmoid() ** {r}", "{h}.roll({n}, -1)", "{h} * (torch.arange({F}) < {n})",
        "{h}.topk({n}, -1)[0].sum(-1, keepdim=True) + {h}", "F.layer_norm({h}, ({F},), eps={r})",
        "F.leaky_relu({h}, {r})", "{h} / {n} + {r}", "F.elu({h}, alpha={r})", "{h} * ({n} > 3)",
        "F.softplus({h}, beta={r})", "{h}.index_fill(-1, torch.tensor([1]), {r})",
        "F.pad({h}[..., 1:], (0, 1), value={n})", "torch.full_like({h}, {r}) * {h}", "F.threshold({h}, {r} - 3, {n})",
        "torch.addcmul({h}, {h}, {o}, value={n})", "F.hardtanh({h}, -{n}, {n})",
        "{h}.narrow(-1, 0, {n}).sum(-1, keepdim=True) * {h}", "torch.lerp({h}, {o}, {r})", "F.celu({h}, {r})",
        "{h}[..., {n} - 1:{n}] * {h}", "{h}.select(-1, {n} - 1)[..., None] + {h}",
        "{h}.norm({n}, -1, keepdim=True) * {h}", "F.normalize({h}, p=2, dim=-1, eps={r})",
        "torch.where({h} > 0, {h}, {n})", "torch.where({h} > 0, {h}, {r})", "{h}.remainder({n})", "{h} * max({n}, 3)",
        "{h} + int({r})",
    ),
    "bound": (
        "{h}.clamp(-1, {z} - 3)", "({h} * 20).clamp(-5, {z})", "({h} * 9).clamp({n} - {z}, {z})",
        "{h}.clamp(max={z} / 4)", "{h}.clamp(-{n}, {n} * {z})", "F.hardtanh({h}, -1, {z} - 0.5)",
        "({h} * 20).clamp(-{z}, {n})", "{h}.clamp({r} - {z}, 4)",
    ),
    "size of an op": (
        "{h}.masked_fill({h} > 0, {z})", "{h} * {z}", "{h} / {z} ** 0.5",
        "torch.add({h}, {o}, alpha={z})", "{h} + torch.arange({z}).sum()", "{h} * (1 / {z})",
        "{h} - float({z})", "F.leaky_relu({h}, 1 / {z})", "{h} * (torch.arange({F}) < {z})", "{h}.roll({z}, -1)",
        "{h}.sigmoid() ** {z}", "{h} * min({z}, 5)", "torch.full_like({h}, {z}) + {h}",
        "torch.where({h} > 0, {h}, {z})", "{h} * {h}.numel()", "{h} + torch.arange({z}).view(-1, 1)", "{h} * {n} * {z}",
        "{h} + torch.ones({z}, 1)",
        "torch.addcmul({h}, {h}, {o}, value=1 / {z})", "{h} * ({z} % 2)", "{h} * ({z} - {n})",
        "F.pad({h}[..., 1:], (0, 1), value={z})",
    ),
}  # fmt: skip
# statements that change {h}
WRITES = {
    "write": (
        "{h} += {o}", "{h}.mul_(1.5)", "{h}[..., :{H}] = {o}[..., {H}:]", "{h}[..., 0] = 0",
        "{h}.masked_fill_({m} == 0, 0.5)", "{h}.zero_()", "{h}.copy_({o} * 2)", "{h}.add_({w})", "{h}[..., ::2] *= 2",
        "{h}[..., 0::2], {h}[..., 1::2] = {o}[..., 1::2], -{o}[..., 0::2]", "{h}.clamp_(-1, 1)",
        "{h}[..., 1:] += {h}[..., :-1].detach().clone()", "{h}[{m}[..., 0] == 0] = 0", "{h}.view(-1)[:2] = 0.25",
        "{h}.flatten(0, -2)[:, 1].mul_(3)", "{h}.transpose(-1, -2)[..., :1] *= 2", "{h}[..., {i}] = {o}[..., {i}] * 2",
        "{h}.index_fill_(-1, {i}[:1], 0.0)", "{h}.scatter_(-1, {h}.argmax(-1, keepdim=True), 0.5)",
        "{h}.add_({o}, alpha=2)", "{h}.unsqueeze(0).mul_(2)", "{h}.fill_(0.5)", "{h}[..., :1, :] *= 2",
        "{h}.clamp_(max={z})", "{h}.mul_({n})", "{h}.relu_()", "F.silu({h}, inplace=True)", "{h}.tanh_()",
        "{h}[..., -1] += {h}[..., 0]", "{h}.chunk(2, -1)[1].mul_(2)", "{h}.unbind(-1)[0].add_(1)",
        "{h}.t_().sin_().t_()", "{h}.index_add_(-1, {i}, {o})",
    ),
    "write without gradient": (
        "with torch.no_grad():\n    {h} -= {h}.amax(-1, keepdim=True)", "with torch.no_grad():\n    {h}.mul_(1.5)",
        "{h}.detach().mul_(2)", "{h}.data.add_(1)", "with torch.no_grad():\n    {h}.zero_()",
        "with torch.no_grad():\n    {h}[..., :{H}] = {o}[..., {H}:]", "{h}.detach()[..., 0] = 0.5",
        "with torch.no_grad():\n    {h}.masked_fill_({m} == 0, 0.5)", "with torch.no_grad():\n    {h}.copy_({o})",
        "with torch.no_grad():\n    {h}.clamp_(-1, 1)", "{h}.data[..., ::2] *= 2", "{h}.data = {h}.data * 2",
        "with torch.no_grad():\n    with torch.enable_grad():\n        {h}.mul_(2)", "{h}.detach().copy_({o})",
        "with torch.no_grad():\n    {h}.view(-1)[:3] = 1",
        "with torch.no_grad():\n    {h} /= {h}.norm(dim=-1, keepdim=True) + 1",
        "with torch.no_grad():\n    {h}.flatten(0, -2).mul_(2)", "{h}.detach_()",
        "with torch.no_grad():\n    torch.mul({h}, 2, out={h})", "with torch.inference_mode(False):\n    {h}.mul_(2)",
        "torch.nn.init.zeros_({h})", "{h}.detach().unflatten(-1, (2, -1))[..., 0, :].zero_()",
    ),
}  # fmt: skip
# several statements
MADE = {
    "buffer": (
        "{v} = torch.empty_like({h})\n{v}[..., 0::2], {v}[..., 1::2] = {h}[..., 1::2], -{h}[..., 0::2]",
        "{v} = torch.zeros_like({h})\n{v} += {h}", "{v} = {h}.new_zeros({h}.shape)\n{v}[..., :{H}] = {h}[..., {H}:]",
        "with torch.no_grad():\n    {v} = torch.zeros_like({h})\n{v}[..., 1:] = {h}[..., :-1]",
        "with torch.no_grad():\n    {v} = torch.empty_like({h})\n{v}.copy_({h})", "{v} = {h}.clone()\n{v}[..., 0] = 0",
        "{v} = torch.empty_like({h})\nwith torch.no_grad():\n    torch.mul({h}, 2, out={v})\n{v} = {v} * {h}",
        "{v} = torch.zeros({h}.shape, dtype=D)\n{v}.add_({h})", "{v} = torch.ones_like({h})\n{v}.mul_({h}).add_(1)",
        "{v} = {h}.clone()\n{v}.narrow({t}, 0, 1).zero_()", "{v} = torch.empty_like({h})\n{v}[:] = {h} * 2",
        "{u} = {h}.view(-1, {F})\n{u} *= 2\n{v} = {h} + 1", "{v} = {h} * 1\n{u} = {v}[..., :2]\n{u}.mul_(3)",
        "{v} = torch.empty({h}.shape, dtype=D)\nfor k in range({F}):\n    {v}[..., k] = {h}[..., k] * (k + 1)",
    ),
    "grad mode": (
        "with torch.no_grad():\n    {u} = {h}.amax(-1, keepdim=True)\n{v} = {h} - {u}",
        "with torch.no_grad():\n    {u} = {h} * 2\n    with torch.enable_grad():\n        {v} = {h} * {u}",
        "with torch.no_grad():\n    {u} = {h}.softmax(-1)\n{v} = {h} * {u}", "{u} = {h}.detach()\n{v} = {h} + {u} * 2",
        "{v} = {h} + ({h}.tanh() - {h}).detach()",
        "with torch.set_grad_enabled(False):\n    {u} = {h} > 0\n{v} = {h} * {u}",
        "with torch.no_grad():\n    {u} = {h}.clone()\n    {u}.mul_(2)\n{v} = {h} * {u}",
    ),
    "tuple": (
        "{u}, {v} = {h}.max(-1, keepdim=True)\n{v} = {h} - {u} + {v}",
        "{u}, {v} = {h}.chunk(2, -1)\n{v} = torch.cat([{v}, {u}], -1)",
        "{u} = {h}.split(({F} // 4), -1)\n{v} = {h} * {u}[0].sum(-1, keepdim=True) + {u}[-1].mean()",
        "{u} = {h}.unbind(-1)\n{v} = torch.stack(({u}[1], *{u}[1:]), -1)",
        "{u} = {h}.sort(-1)\n{v} = {u}.values * ({u}.indices > 1)",
        "{u} = torch.var_mean({h}, -1, keepdim=True)\n{v} = ({h} - {u}[1]) * torch.rsqrt({u}[0] + 1e-3)",
        "{u} = torch.aminmax({h}, dim=-1, keepdim=True)\n{v} = {h} - {u}.min + {u}.max",
        "{u} = [{h} * k for k in (1, 2)]\n{v} = sum({u})",
    ),
}  # fmt: skip
