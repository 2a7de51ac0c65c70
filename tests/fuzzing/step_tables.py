"""Templates of steps on wide values, by kind.

{h} is the value, {F} its features and {H} half of them, {o} another value of its shape, {w} a weight of its features,
{n} a whole number and {r} a fraction that vary from call to call, {z} a size that does, {m} a mask of its tokens,
{i} a permutation of its features, {t} its first dim of tokens; {v} is the result and {u} a name between, where a
template has several statements.
"""

from __future__ import annotations

# along the features, in all ways that leave a value of the same shape
FEATURES = {
    "flip": (
        "{h}.flip(-1)", "{h} + {h}.flip(-1)",
    ),
    "roll": (
        "{h}.roll(1, -1)", "{h} * {h}.roll(({F} // 2), -1)",
    ),
    "pad": (
        "F.pad({h}[..., 1:], (0, 1))", "F.pad({h}, (1, 0))[..., :-1]", "F.pad({h}[..., :-2], (1, 1), value=0.5)",
    ),
    "cat": (
        "torch.cat([{h}[..., {H}:], {h}[..., :{H}]], -1)", "torch.cat([{h}, {o}], -1)[..., {H}:-{H}]",
        "torch.cat([torch.zeros_like({h}[..., :1]), {h}[..., :-1]], -1)",
        "torch.cat((-{h}[..., 1::2], {h}[..., ::2]), dim=-1)",
    ),
    "stack": (
        "torch.stack([{h}[..., ::2], {h}[..., 1::2]], -1).flatten(-2)", "torch.stack([{h}, {o}]).mean(0)",
        "torch.stack([{h}, {o}], -2)[..., 0, :]",
    ),
    "cut": (
        "{h}.chunk(2, -1)[0].repeat_interleave(2, -1)", "{h}.narrow(-1, 0, {H}).repeat(*([1] * ({h}.dim() - 1)), 2)",
        "torch.cat({h}.split([{H}, {H}], -1)[::-1], -1)", "torch.cat({h}.unbind(-1)[:2], 0).sum() + {h}",
    ),
    "heads": (
        "{h}.unflatten(-1, (2, -1)).softmax(-1).flatten(-2)",
        "{h}.view(*{h}.shape[:-1], 2, {H}).transpose(-1, -2).reshape({h}.shape)",
        "{h}.unflatten(-1, ({H}, 2)).sum(-1, keepdim=True).expand(*{h}.shape[:-1], {H}, 2).flatten(-2)",
        "F.normalize({h}.unflatten(-1, (2, {H})), dim=-1).flatten(-2)",
        "({h}.unflatten(-1, (2, {H})) * {w}.view(2, -1)).flatten(-2)",
    ),
    "views": (
        "{h}.transpose(-1, -2).tanh().transpose(-1, -2)", "{h}.movedim(-1, 0).contiguous().movedim(0, -1)",
        "{h}.unsqueeze(0).squeeze(0)", "{h}.reshape(-1, {F}).sin().view({h}.shape)",
        "{h}.transpose(0, -1).contiguous().transpose(0, -1)", "{h}.unsqueeze(-2).squeeze(-2) * 2",
        "{h}.flatten(0, -2).cos().view_as({h})", "{h}.contiguous()", "{h}.mT.clone().mT",
        "{h}.swapaxes(-1, -2).relu().swapaxes(-2, -1)", "F.instance_norm({h}.transpose(-1, -2)).transpose(-1, -2)",
        "{h}.as_strided({h}.shape, {h}.stride())",
    ),
    "gather": (
        "{h}.gather(-1, {h}.argsort(-1))", "{h}.index_select(-1, {i})", "{h}[..., {i}]",
        "{h}.take_along_dim({h}.argmax(-1, keepdim=True), -1) + {h}", "{h}.gather(-1, {i}.expand_as({h}))",
    ),
    "scatter": (
        "torch.zeros_like({h}).scatter(-1, {h}.argsort(-1), {h})", "{h}.index_add(-1, {i}, {o})",
        "{h}.scatter_add(-1, {i}.expand_as({h}), {o})", "{h}.index_copy(-1, torch.arange({H}), {o}[..., :{H}])",
        "torch.zeros_like({h}).scatter_(-1, {h}.topk(2, -1)[1], 1.0) * {h}",
        "{h}.index_fill(-1, torch.tensor([0, 2]), 0.5)", "{h}.slice_scatter({o}[..., :2], -1, 0, 2)",
        "{h}.select_scatter({o}[..., 1], -1, 0)",
    ),
    "sort": (
        "{h}.sort(-1)[0]", "{h}.sort(-1, descending=True).values.cumsum(-1)",
        "{h}.topk(3, -1)[0].sum(-1, keepdim=True) * {h}", "{h}.masked_fill({h} < {h}.topk(2, -1)[0][..., -1:], 0.0)",
        "{h}.kthvalue(2, -1, keepdim=True)[0] - {h}", "{h} - {h}.median(-1, keepdim=True)[0]",
        "{h} * ({h}.argsort(-1) > 2)",
    ),
    "scan": (
        "{h}.cumsum(-1)", "{h}.tanh().cumprod(-1)", "{h}.logcumsumexp(-1)", "{h}.cummax(-1)[0]",
        "{h}.diff(dim=-1, prepend={h}[..., :1])",
    ),
    "row": (
        "{h}.softmax(-1)", "{h} - {h}.mean(-1, keepdim=True)", "{h} - {h}.amax(-1, keepdim=True)",
        "{h} / ({h}.norm(dim=-1, keepdim=True) + 1)", "F.layer_norm({h}, ({F},), {w})",
        "{h} * {h}.std(-1, keepdim=True)", "{h}.log_softmax(-1)", "F.normalize({h}, dim=-1)",
        "{h}.argmax(-1, keepdim=True) + {h}",
    ),
    "elementwise": (
        "{h} * {o}", "{h} + {w}", "torch.where({h} > 0, {h}, {o})", "{h} * {m}", "{h}.masked_fill({m} == 0, -1.0)",
        "3 * torch.tanh({h} / 3)", "torch.addcmul({h}, {h}, {o}, value=0.3)", "torch.lerp({h}, {o}, 0.4)",
        "torch.maximum({h}, {o} * 2)", "{h}.pow(2) - {h}", "{h} * {h}.detach()", "{h}.float().double()",
        "({h}.to(torch.float32) * 2).to(D)", "{h}.clamp_min(-0.5)", "torch.add({h}, {o}, alpha=2)",
        "{h}.reciprocal().clamp(-2, 2)", "F.glu(torch.cat([{h}, {o}], -1), -1)", "torch.complex({h}, {o}).abs()",
        "{h}.type(torch.float32).type_as({h})", "torch.heaviside({h}, {o}.detach()) * {o}",
    ),
}  # fmt: skip
# along the tokens
TOKENS = {
    "cut tokens": (
        "{h}.narrow({t}, 1, {z} - 1)", "{h}.narrow({t}, 0, max({z} - 1, 1))", "{h}.select({t}, 0)",
        "{h}.narrow({t}, 0, {z} // 2 + 1)", "{h}[..., ::2, :]", "{h}[..., -1:, :]", "{h}[..., :{n}, :]",
        "{h}[..., {n}:, :]", "torch.cat({h}.split(2, {t})[::-1], {t})", "torch.cat({h}.chunk(2, {t}), {t})",
        "{h}[..., 1:, :] - {h}[..., :-1, :]", "{h}[0]", "{h}[-1:]", "torch.cat([{h}[:1], {h}[1:]])",
        "torch.stack({h}.unbind(0))",
    ),
    "mix tokens": (
        "{h}.roll(1, {t})", "{h}.roll({n}, {t})", "{h}.flip({t})", "{h} - {h}.mean({t}, keepdim=True)",
        "{h}.softmax({t})", "{h}.cumsum({t})", "{h} / {h}.abs().amax()",
        "{h}.index_select({t}, torch.arange({z}).flip(0))", "{h} * {h}.norm()",
        "{h} * {h}.sum({t}, keepdim=True).sigmoid()", "{h} + {h}.flatten().sort()[0][0]",
        "{h}.index_add({t}, torch.zeros({z}, dtype=torch.long), {h})", "{h} * ({h} > {h}.detach().mean())",
        "{h} - torch.quantile({h}.detach(), 0.5)", "{h}.clamp(max={h}.detach().max() / 2)",
        "{h}.repeat_interleave(2, 0)", "torch.cat([{h}, {o}], 0)", "F.pad({h}, (0, 0, 1, 0))",
        "torch.cat([{h}, {o} * 2], {t})", "{h}[torch.randperm(2) % 1]",
        "{h}.index_select({t}, torch.arange({z} // 2 + 1))",
    ),
}  # fmt: skip
