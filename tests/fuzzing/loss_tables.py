"""Templates of what becomes of logits, by kind.

{l} are the logits [.., V], {f} the logits of flattened tokens and {y} their labels, {Y} labels of the shape of the
tokens, {q} probabilities, {c} weights of the classes, {n} a whole number and {r} a fraction that vary from call to
call, {m} a mask of the tokens.
"""

from __future__ import annotations

PLAIN_SHIFTS = (
    "F.cross_entropy({l}[:, :-1].flatten(0, 1), {Y}[:, 1:].flatten())",
    "F.cross_entropy({l}[:, :-1].flatten(0, 1).float(), {Y}[:, 1:].flatten())",
    "F.cross_entropy({l}[:, :-1].reshape(-1, {V}), {Y}[:, 1:].reshape(-1))",
    "F.cross_entropy({l}[:, :-1].contiguous().view(-1, {V}), {Y}[:, 1:].contiguous().view(-1))",
)
LOSSES = {
    "cross entropy": (
        "F.cross_entropy({f}, {y})", "F.cross_entropy({f}, {y})", "F.cross_entropy({f}, {y}, reduction='sum')",
        "F.cross_entropy({f}, {y}, reduction='none').view({l}.shape[:-1])", "F.cross_entropy({f}, {y}, ignore_index=1)",
        "F.cross_entropy({f}, {y}, weight={c})", "F.cross_entropy({f}, {y}, label_smoothing=0.1)",
        "F.cross_entropy({f}, {y}, {c}, ignore_index=0, label_smoothing=0.2, reduction='sum')",
        "F.cross_entropy({f}, {y}, label_smoothing={r} / 8)", "F.cross_entropy({f}, {y}, reduction='sum') / {n}",
        "F.cross_entropy({f}.float(), {y}).double()", "F.cross_entropy({f} / {r}, {y})",
        "F.cross_entropy({f}, {f}.detach().softmax(-1))", "F.cross_entropy({l}.transpose(-1, 1), {Y})",
        "F.cross_entropy({f}, {y}, ignore_index={n})", "F.cross_entropy({f}, {y}) * {f}.shape[0]",
        "F.nll_loss(F.log_softmax({f}, -1), {y})",
        "F.cross_entropy({f}, {y}, reduction='none').mul({f}.detach().amax(-1)).sum()",
        "F.cross_entropy({f}.clamp(-5, {f}.shape[0]), {y})", "F.multi_margin_loss({f}, {y})",
    ),
    "picked": (
        "-{l}.log_softmax(-1).gather(-1, {Y}.unsqueeze(-1)).squeeze(-1)",
        "-F.log_softmax({f}, -1)[torch.arange({f}.shape[0]), {y}].mean()",
        "({l}.logsumexp(-1) - {l}.gather(-1, {Y}[..., None])[..., 0]).mean()",
        "-({l}.log_softmax(-1) * F.one_hot({Y}, {V})).sum(-1).mean()",
        "-torch.gather({f}.log_softmax(-1), 1, {y}[:, None]).sum()",
        "(({l}.log_softmax(-1).gather(-1, {Y}[..., None])[..., 0]).exp() * {m}).sum() / {m}.sum().clamp(min=1)",
        "{l}.softmax(-1).gather(-1, {Y}[..., None]).log().mean()",
    ),
    "statistic": (
        "{l}.logsumexp(-1).square().mean()", "{l}.logsumexp(-1)", "(5 * torch.tanh({l} / 5)).logsumexp(-1).sum()",
        "-({l}.softmax(-1) * {l}.log_softmax(-1)).sum(-1).mean()", "{l}.amax(-1).mean()", "{l}.square().mean()",
        "{l}.sum(-1).tanh()", "({l} * {r}).logsumexp(-1).sum()", "({l} * {l}.shape[0] ** 0.5).logsumexp(-1).mean()",
        "torch.logsumexp({l} + {n}, -1, keepdim=True)", "{l}.std()", "{l}.norm()", "{l}.mean((0, 1))",
        "{l}.var(-1).sum()", "{l}.topk(2, -1)[0].sum()",
    ),
    "against targets": (
        "F.kl_div({l}.log_softmax(-1), {q}, reduction='batchmean')",
        "F.kl_div({l}.log_softmax(-1), {q}.log(), log_target=True, reduction='sum')", "F.mse_loss({l}, {q})",
        "F.binary_cross_entropy_with_logits({l}, {q})", "F.smooth_l1_loss({l}, {q}, reduction='sum')",
        "-torch.einsum('...v,...v->...', {q}, {l}.log_softmax(-1)).mean()", "F.huber_loss({l}, {q}, delta={r})",
        "F.cosine_similarity({l}, {q}, dim=-1).mean()", "(({l} - {q}).abs().sum(-1) * {m}).mean()",
        "F.kl_div({l}.log_softmax(-1), {l}.detach().softmax(-1))",
    ),
    "shifted": (
        *PLAIN_SHIFTS, *PLAIN_SHIFTS,
        "F.cross_entropy({l}[..., :-1, :].reshape(-1, {V}), {Y}[..., 1:].reshape(-1))",
        "F.cross_entropy({l}[:, :-1].flatten(0, 1), {Y}[:, 1:].flatten())",
        "F.cross_entropy({l}[:, :-1].contiguous().view(-1, {V}), {Y}[:, 1:].contiguous().view(-1), reduction='sum')",
        "F.cross_entropy({l}[:, :-1].transpose(1, 2), {Y}[:, 1:])",
        "F.cross_entropy({l}[:, {n}:].reshape(-1, {V}), {Y}[:, {n}:].reshape(-1))",
        "-{l}[:, :-1].log_softmax(-1).gather(-1, {Y}[:, 1:, None]).mean()", "F.cross_entropy({l}[0], {Y}[0])",
        "F.cross_entropy({l}[..., -1, :].reshape(-1, {V}), {Y}[..., -1].reshape(-1))",
        "F.cross_entropy({l}[:, -{n}:].flatten(0, 1), {Y}[:, -{n}:].flatten())",
    ),
    "pieces": (
        "sum(F.cross_entropy(a, b, reduction='sum') for a, b in zip({f}.split(4), {y}.split(4)))",
        "torch.cat([a.logsumexp(-1) for a in {f}.split(3)])",
        "F.cross_entropy({f}[:2], {y}[:2]) + 2 * F.cross_entropy({f}[2:], {y}[2:])",
        "torch.stack([F.cross_entropy(a.reshape(-1, {V}), b.reshape(-1)) for a, b in zip({l}, {Y})]).mean()",
        "sum(a.logsumexp(-1).sum() for a in {f}.chunk(2))",
        "torch.cat([a.log_softmax(-1) for a in {f}.split(3)]).gather(-1, {y}[:, None]).mean()",
        "torch.cat([F.cross_entropy(a, b, reduction='none') for a, b in zip({f}.chunk(3), {y}.chunk(3))]).sum()",
        "torch.stack([z.logsumexp(-1) for z in {l}.unbind(0)])", "F.cross_entropy(torch.cat([{f}[:2], {f}[2:]]), {y})",
        "F.cross_entropy(torch.cat({f}.split(4)[::-1]), torch.cat({y}.split(4)[::-1]))",
        "F.cross_entropy({f}[1:], {y}[1:]) + F.cross_entropy({f}[:-1], {y}[:-1])",
        "F.cross_entropy({f}.narrow(0, 0, 3), {y}[:3]) * 2 + {f}[3:].logsumexp(-1).mean()",
        "sum(F.cross_entropy(a.flatten(0, -2), b.flatten()) for a, b in zip({l}.unbind(0), {Y}.unbind(0)))",
        "sum((a.logsumexp(-1) * b).sum() for a, b in zip({f}.tensor_split(3), {y}.tensor_split(3)))",
        "torch.cat([a.logsumexp(-1) for a in {f}.split([1, 2, {f}.shape[0] - 3])])",
        "(torch.cat([a.amax(-1) for a in {f}.split(4)]) * torch.cat([a.detach()[:, 0] for a in {f}.split(4)])).sum()",
    ),
    "checkpointed": (
        "checkpoint(F.cross_entropy, {f}, {y}, use_reentrant=False)",
        "checkpoint(lambda z: F.cross_entropy(z, {y}), {f}, use_reentrant=False)",
        "checkpoint(lambda z: z.logsumexp(-1), {l}, use_reentrant=False).sum()",
        "checkpoint(torch.log_softmax, {l}, -1, use_reentrant=False).gather(-1, {Y}[..., None]).mean()",
        "sum(checkpoint(F.cross_entropy, a, b, use_reentrant=False) for a, b in zip({f}.split(3), {y}.split(3)))",
    ),
    "own gradients": (
        "F.cross_entropy(Clipped.apply({f}, 0.01), {y})", "Scaled.apply(F.cross_entropy({f}, {y}), 3.0)",
        "F.cross_entropy(Scaled.apply({l}, 0.5).flatten(0, -2), {y}, reduction='sum')",
        "F.cross_entropy(StraightThrough.apply({f}), {y})", "RowScaled.apply({l}, {c}).logsumexp(-1).mean()",
        "Clipped.apply(F.cross_entropy({f}, {y}, reduction='none'), 0.2).sum()",
    ),
}  # fmt: skip
METRICS = {
    "metric": (
        "({l}.argmax(-1) == {Y}).double().mean()", "{l}.topk(3, -1)[1].eq({Y}[..., None]).any(-1).sum()",
        "{l}.detach().softmax(-1).amax(-1)", "{l}.argmax(-1)", "{l}.detach().topk(2, -1)[0]", "({l} > 0).sum()",
        "{l}.detach().mean()", "{l}.isnan().any()", "{l}.detach().argsort(-1)[..., 0]",
        "({f}.argmax(-1) == {y}).sum().item() if False else {f}.argmax(-1).eq({y}).sum()", "{l}.shape[1]",
        "{l}.detach().abs().max()", "torch.stack([{l}.detach().max(), {l}.detach().min()])",
    ),
    "range of all": (
        "torch.histc({l}.detach().flatten(), bins=6)", "torch.histc({l}.detach(), 4)",
        "torch.quantile({l}.detach().flatten(), 0.9)", "{l}.detach().median()",
        "torch.histc({l}.detach(), bins=5, min=-2, max=2)", "{l}.detach().aminmax()",
        "{l}.detach().flatten().topk(3)[0]", "torch.bucketize({l}.detach(), torch.linspace(-1, 1, 5))",
        "{l}.detach().std()", "{l}.detach().flatten().sort()[0][:2]", "{l}.detach().flatten().kthvalue(2)[0]",
        "{l}.detach().flatten().argmax()", "torch.unique({l}.argmax(-1)).numel() * 0",
        "torch.histogram({l}.detach().flatten(), 4)[0]", "torch.bincount({f}.argmax(-1), minlength={V})",
        "({l} > {l}.detach().mean()).double().mean()", "{l}.detach().nanmedian()",
        "torch.count_nonzero({l} > {l}.detach().amax(0, keepdim=True) - 1)",
    ),
}  # fmt: skip
