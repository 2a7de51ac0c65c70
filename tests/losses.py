"""What users make of the logits of a large head, written as they write it.

Legend: B sequences, T tokens each, D model, V vocabulary. Every program takes the hidden states x_BTD, the head w_VD,
labels_BT and whatever it names; all gradients are of the first two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

B, T, D, V = 2, 128, 8, 160
IGNORED = -100

Program = Callable[..., Any]
CROSS_ENTROPY: dict[str, Program] = {}
SHIFTED: dict[str, Program] = {}
PER_TOKEN: dict[str, Program] = {}
REINFORCEMENT: dict[str, Program] = {}
DISTILLATION: dict[str, Program] = {}
HEADS: dict[str, Program] = {}
RETURNED: dict[str, Program] = {}


def add(group: dict[str, Program]) -> Callable[[Program], Program]:
    def register(program: Program) -> Program:
        assert program.__name__ not in group
        group[program.__name__] = program
        return program

    return register


def flat(x, w, y):
    return (x @ w.t()).view(-1, V), y.view(-1)


# 1. cross-entropy, everything it takes


for _reduction in ("mean", "sum", "none"):

    def _reduced(x, w, y, reduction=_reduction):
        return F.cross_entropy(*flat(x, w, y), reduction=reduction)

    CROSS_ENTROPY[f"reduction_{_reduction}"] = _reduced

    def _smoothed(x, w, y, reduction=_reduction):
        return F.cross_entropy(*flat(x, w, y), reduction=reduction, label_smoothing=0.1)

    CROSS_ENTROPY[f"label_smoothing_{_reduction}"] = _smoothed

    def _weighted(x, w, y, reduction=_reduction):
        return F.cross_entropy(*flat(x, w, y), x.new_ones(V) * 0.5 + w.detach()[:, 0] ** 2, reduction=reduction)

    CROSS_ENTROPY[f"class_weights_{_reduction}"] = _weighted

    def _images(x, w, y, reduction=_reduction):
        return F.cross_entropy((x @ w.t()).transpose(1, 2), y, reduction=reduction)

    CROSS_ENTROPY[f"k_dim_{_reduction}"] = _images

    def _binary(x, w, y, reduction=_reduction):
        return F.binary_cross_entropy_with_logits(x @ w.t(), soft_labels(y), reduction=reduction).sum(
            -1 if reduction == "none" else ()
        )

    CROSS_ENTROPY[f"binary_{_reduction}"] = _binary

    def _squared(x, w, y, reduction=_reduction):
        return F.mse_loss(x @ w.t(), soft_labels(y), reduction=reduction).sum(-1 if reduction == "none" else ())

    CROSS_ENTROPY[f"squared_error_{_reduction}"] = _squared

    def _soft(x, w, y, reduction=_reduction):
        return F.cross_entropy(flat(x, w, y)[0], soft_labels(y).view(-1, V), reduction=reduction)

    CROSS_ENTROPY[f"probabilities_{_reduction}"] = _soft


def soft_labels(y_BT: torch.Tensor) -> torch.Tensor:
    """A distribution [B, T, V] a token, given from outside the graph's large values."""
    return F.softmax(torch.sin(y_BT.unsqueeze(-1) * torch.arange(1, V + 1, dtype=torch.float64)), -1)


@add(CROSS_ENTROPY)
def ignored_labels(x, w, y):
    return F.cross_entropy(*flat(x, w, torch.where(y < V // 2, y, IGNORED)))


@add(CROSS_ENTROPY)
def smoothed_weighted_and_ignored(x, w, y):
    weight = w.detach()[:, 0].square()
    return F.cross_entropy(*flat(x, w, torch.where(y < V // 2, y, 3)), weight, ignore_index=3, label_smoothing=0.2)


@add(CROSS_ENTROPY)
def nll_of_log_softmax(x, w, y):
    return F.nll_loss(F.log_softmax((x @ w.t()).float(), dim=-1).view(-1, V), y.view(-1))


@add(CROSS_ENTROPY)
def sum_over_num_items(x, w, y):
    return F.cross_entropy(*flat(x, w, y), reduction="sum") / (y != IGNORED).sum()


@add(CROSS_ENTROPY)
def bias(x, w, y):
    return F.cross_entropy(F.linear(x, w, w[:, 1] * 0.1).view(-1, V), y.view(-1))


@add(CROSS_ENTROPY)
def soft_cap(x, w, y):
    return F.cross_entropy(torch.tanh(flat(x, w, y)[0] / 30.0) * 30.0, y.view(-1))


@add(CROSS_ENTROPY)
def temperature(x, w, y):
    scale = x.new_tensor(0.7)
    return F.cross_entropy(flat(x, w, y)[0] * 0.5 / scale, y.view(-1))


@add(CROSS_ENTROPY)
def temperature_in_place(x, w, y):
    logits = x @ w.t()
    logits = logits.div_(0.7)
    logits *= 1.5
    return F.cross_entropy(logits.view(-1, V), y.view(-1))


@add(CROSS_ENTROPY)
def masked_vocabulary_in_place(x, w, y):
    logits = x @ w.t()
    logits[..., V - 3 :] = -1e4
    return F.cross_entropy(logits.view(-1, V), y.view(-1) % (V - 3))


@add(CROSS_ENTROPY)
def z_loss(x, w, y):
    logits, labels = flat(x, w, y)
    return F.cross_entropy(logits, labels) + 1e-2 * torch.logsumexp(logits, -1).square().mean()


@add(CROSS_ENTROPY)
def three_terms(x, w, y):
    logits, labels = flat(x, w, y)
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    valid = (labels % 3 != 0).to(x.dtype)
    return F.nll_loss(log_probs, labels) - 0.01 * (entropy * valid).sum() / valid.sum() + logits.square().mean() * 1e-3


@add(CROSS_ENTROPY)
def times_a_factor(x, w, y):
    return 0.25 * F.cross_entropy(*flat(x, w, y)) * x.new_tensor(3.0)


@add(CROSS_ENTROPY)
def margin(x, w, y):
    return F.multi_margin_loss(*flat(x, w, y))


@add(CROSS_ENTROPY)
def focal(x, w, y):
    each = F.cross_entropy(*flat(x, w, y), reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


# 2. the shift, in every spelling


@add(SHIFTED)
def padded_labels(x, w, y):
    y = F.pad(y, (0, 1), value=IGNORED)[..., 1:].contiguous()
    return F.cross_entropy(*flat(x, w, y))


@add(SHIFTED)
def sliced_logits(x, w, y):
    return F.cross_entropy((x @ w.t())[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))


@add(SHIFTED)
def sliced_contiguous_logits(x, w, y):
    logits = F.linear(x, w).float()
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1))


@add(SHIFTED)
def sliced_and_transposed(x, w, y):
    return F.cross_entropy((x @ w.t())[:, :-1].transpose(1, 2), y[:, 1:])


@add(SHIFTED)
def prefix_left_out(x, w, y):
    return F.cross_entropy((x @ w.t())[:, 5:-1].flatten(0, 1), y[:, 6:].flatten())


@add(SHIFTED)
def narrowed(x, w, y):
    return F.cross_entropy((x @ w.t()).narrow(1, 0, T - 1).flatten(0, 1), y[:, 1:].flatten())


# 3. results per token


@add(PER_TOKEN)
def log_softmax_and_gather(x, w, y):
    return torch.gather(F.log_softmax((x @ w.t()).float(), -1), -1, y.unsqueeze(-1)).squeeze(-1)


@add(PER_TOKEN)
def gather_minus_logsumexp(x, w, y):
    logits = (x @ w.t()).float() / 0.8
    chosen = torch.gather(logits, dim=-1, index=y.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(logits, dim=-1)


@add(PER_TOKEN)
def row_by_row(x, w, y):
    logits = x @ w.t()
    chosen = logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


@add(PER_TOKEN)
def cross_entropy_as_log_probabilities(x, w, y):
    return -F.cross_entropy((x @ w.t()).float().permute(0, 2, 1), y, reduction="none")


@add(PER_TOKEN)
def log_probabilities_and_entropy(x, w, y):
    logits = x @ w.t()
    log_probs = logits.log_softmax(-1)
    probs = F.softmax(logits, dim=-1)
    entropy = torch.logsumexp(logits, dim=-1) - torch.sum(probs * logits, dim=-1)
    return log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1), entropy


@add(PER_TOKEN)
def loss_and_accuracy(x, w, y):
    logits, labels = flat(x, w, y)
    correct = (logits.argmax(-1) == labels) & (labels != IGNORED)
    return F.cross_entropy(logits, labels), correct.float().mean()


@add(PER_TOKEN)
def loss_and_top_k(x, w, y):
    logits, labels = flat(x, w, y)
    top = logits.topk(3, dim=-1)
    hits = (top.indices == labels.unsqueeze(-1)).any(-1).sum()
    return F.cross_entropy(logits, labels), hits, top.values


@add(PER_TOKEN)
def metrics_under_no_grad(x, w, y):
    logits, labels = flat(x, w, y)
    with torch.no_grad():
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    return F.cross_entropy(logits, labels), entropy


@add(PER_TOKEN)
def detached_metrics(x, w, y):
    logits, labels = flat(x, w, y)
    return F.cross_entropy(logits, labels), logits.detach().softmax(-1).amax(-1).mean()


@add(PER_TOKEN)
def only_a_metric(x, w, y):
    return ((x @ w.t()).argmax(-1) == y).float().mean()


@add(SHIFTED)
def last_token(x, w, y):
    return (x @ w.t()).float()[:, -1]


@add(SHIFTED)
def last_tokens(x, w, y):
    return F.linear(x, w, w[:, 0])[:, -3:, :] * 2


@add(SHIFTED)
def two_cuts(x, w, y):
    logits = (x @ w.t())[:, :-1]
    logits = logits[:, -7:] / 0.9
    return logits.log_softmax(-1).gather(-1, y[:, -7:, None]).squeeze(-1)


# 4. reinforcement learning and preferences, as the trainers write them


def selective_log_softmax(logits, index):
    """Log-probabilities of the chosen tokens, row by row where that is more exact."""
    if logits.dtype in (torch.float32, torch.float64):
        chosen = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
        return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    rows = zip(logits, index, strict=True)
    return torch.stack([F.log_softmax(row, dim=-1).gather(-1, i.unsqueeze(-1)).squeeze(-1) for row, i in rows])


def completion_log_probs(x, w, y, keep):
    """Of the last `keep` tokens, from logits that are shifted, cut and divided by a temperature."""
    logits = (x @ w.t())[:, :-1, :]
    logits = logits[:, -keep:, :] / 0.9
    return selective_log_softmax(logits, y[:, -keep:])


KEEP = 100


def constants(y):
    """Advantages [B], a mask [B, KEEP] and old and reference log-probabilities [B, KEEP], made of the labels alone."""
    signal = torch.sin(y[:, -KEEP:].double())
    return signal[:, 0], (y[:, -KEEP:] % 4 != 0).double(), -4 + signal, -4 + signal.flip(1)


def grpo_terms(log_probs, y, per_token_old=True):
    advantages, mask, old, reference = constants(y)
    kl = torch.exp(reference - log_probs) - (reference - log_probs) - 1
    ratio = torch.exp(log_probs - (old if per_token_old else log_probs.detach()))
    clipped = torch.clamp(ratio, 0.8, 1.28)
    each = -torch.min(ratio * advantages.unsqueeze(1), clipped * advantages.unsqueeze(1)) + 0.04 * kl
    return each, mask, kl, ratio


@add(REINFORCEMENT)
def grpo(x, w, y):
    each, mask, _, _ = grpo_terms(completion_log_probs(x, w, y, KEEP), y)
    return ((each * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


@add(REINFORCEMENT)
def grpo_with_metrics(x, w, y):
    each, mask, kl, ratio = grpo_terms(completion_log_probs(x, w, y, KEEP), y, per_token_old=False)
    loss = (each * mask).sum() / mask.sum().clamp(min=1.0)
    clipped = ((ratio < 0.8) | (ratio > 1.28)).double().detach()
    return loss, (kl.detach() * mask).sum() / mask.sum(), (clipped * mask).sum() / mask.sum()


@add(REINFORCEMENT)
def dr_grpo(x, w, y):
    each, mask, _, _ = grpo_terms(completion_log_probs(x, w, y, KEEP), y)
    return (each * mask).sum() / (B * KEEP)


@add(REINFORCEMENT)
def sequence_level_ratio(x, w, y):
    log_probs = completion_log_probs(x, w, y, KEEP)
    advantages, mask, old, _ = constants(y)
    log_ratio = ((log_probs - old) * mask).sum(-1) / mask.sum(-1)
    ratio = torch.exp(log_ratio)
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


@add(REINFORCEMENT)
def ppo_with_entropy(x, w, y):
    logits = (x @ w.t())[:, -KEEP - 1 : -1]
    logits.div_(0.8)
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, y[:, -KEEP:].unsqueeze(-1)).squeeze(-1)
    entropy = torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)
    advantages, mask, old, _ = constants(y)
    ratio = torch.exp(torch.clamp(chosen - old, -20, 20))
    losses = torch.max(-advantages[:, None] * ratio, -advantages[:, None] * ratio.clamp(0.8, 1.2))
    masked_mean = lambda value: (value * mask).sum() / (mask.sum() + 1e-8)  # noqa: E731
    return masked_mean(losses) - 0.01 * masked_mean(entropy)


@add(REINFORCEMENT)
def reference_model(x, w, y):
    log_probs = completion_log_probs(x, w, y, KEEP)
    with torch.no_grad():
        reference = completion_log_probs(x * 0.9, w, y, KEEP)
    kl = torch.exp(reference - log_probs) - (reference - log_probs) - 1
    return kl.mean() - log_probs.mean()


def pairs(x, w, y):
    """Summed log-probabilities of sequences [B]; the first half are chosen, the second rejected."""
    labels = y[:, 1:].clone()
    mask = labels % 5 != 0
    labels[~mask] = 0
    logits = (x @ w.t())[:, :-1]
    each = torch.gather(logits.log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
    return (each * mask).sum(-1), mask.sum(-1), logits


@add(REINFORCEMENT)
def dpo(x, w, y):
    log_probs, _, _ = pairs(x, w, y)
    with torch.no_grad():
        reference, _, _ = pairs(x * 0.9, w, y)
    margin = (log_probs - reference)[: B // 2] - (log_probs - reference)[B // 2 :]
    return -F.logsigmoid(0.1 * margin).mean(), margin.detach()


@add(REINFORCEMENT)
def simpo(x, w, y):
    log_probs, lengths, _ = pairs(x, w, y)
    average = log_probs / lengths
    return -F.logsigmoid(2.0 * (average[: B // 2] - average[B // 2 :]) - 0.5).mean()


@add(REINFORCEMENT)
def orpo(x, w, y):
    log_probs, lengths, logits = pairs(x, w, y)
    chosen, rejected = (log_probs / lengths).chunk(2)
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    nll = F.cross_entropy(logits[: B // 2].flatten(0, 1), y[: B // 2, 1:].flatten())
    return nll - 0.1 * F.logsigmoid(log_odds).mean()


@add(REINFORCEMENT)
def kto(x, w, y):
    log_probs, _, _ = pairs(x, w, y)
    with torch.no_grad():
        reference, _, _ = pairs(x * 0.9, w, y)
    rewards = log_probs - reference
    kl = rewards.mean().clamp(min=0).detach()
    losses = torch.cat(
        [1 - torch.sigmoid(0.1 * (rewards[: B // 2] - kl)), 1 - torch.sigmoid(0.1 * (kl - rewards[B // 2 :]))]
    )
    return losses.nanmean()


# 5. distillation: a teacher's head stands in the same graph


def student_and_teacher(x, w, temperature=2.0):
    with torch.no_grad():
        teacher = (torch.cat([x, x * 0.5], -1) @ torch.cat([w.flip(0), w], -1).t()) / temperature
    return (x @ w.t()) / temperature, teacher


@add(DISTILLATION)
def forward_kl(x, w, y):
    student, teacher = student_and_teacher(x, w)
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean") * 4


@add(DISTILLATION)
def forward_kl_of_probabilities(x, w, y):
    student, teacher = student_and_teacher(x, w)
    each = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="none").sum(-1)
    mask = y != IGNORED
    return (each * mask).sum() / mask.sum() + F.cross_entropy(student.view(-1, V), y.view(-1))


@add(DISTILLATION)
def reverse_kl(x, w, y):
    student, teacher = student_and_teacher(x, w)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


@add(DISTILLATION)
def jensen_shannon(x, w, y, beta=0.3):
    student, teacher = student_and_teacher(x, w)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    bounds = torch.log(torch.tensor([beta, 1 - beta], dtype=x.dtype))
    mixture = torch.logsumexp(torch.stack([log_q + bounds[1], log_p + bounds[0]]), dim=0)
    kl_p = F.kl_div(mixture, log_p, reduction="none", log_target=True)
    kl_q = F.kl_div(mixture, log_q, reduction="none", log_target=True)
    each = beta * kl_p + (1 - beta) * kl_q
    mask = y % 7 != 0
    return each[..., :].sum(-1).mul(mask).sum() / mask.sum()


@add(DISTILLATION)
def cross_entropy_against_teacher(x, w, y):
    student, teacher = student_and_teacher(x, w)
    return F.cross_entropy(student.view(-1, V), teacher.softmax(-1).view(-1, V))


# 6. heads


@add(HEADS)
def lora(x, w, y):
    a, b = w[:4] * 0.3, w[:, :4] * 0.2
    logits = F.linear(x, w.detach()) + F.linear(F.linear(x, a), b) * 0.5
    return F.cross_entropy(logits.view(-1, V), y.view(-1))


@add(HEADS)
def frozen(x, w, y):
    return F.cross_entropy(*flat(x, w.detach(), y))


@add(HEADS)
def tied(x, w, y):
    return F.cross_entropy(*flat(x + F.embedding(y, w), w, y))


@add(HEADS)
def two_heads(x, w, y):
    second = F.linear(x.tanh(), w * 0.5)
    one = F.cross_entropy(F.linear(x, w)[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    return one + 0.3 * F.cross_entropy(second[:, :-2].flatten(0, 1), y[:, 2:].flatten())


@add(HEADS)
def one_head_twice(x, w, y):
    return F.cross_entropy(*flat(x, w, y)) + 0.1 * F.cross_entropy(*flat(x.tanh(), w, y.flip(1)))


@add(HEADS)
def under_checkpoint(x, w, y):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda *args: F.cross_entropy(*flat(*args)), x, w, y, use_reentrant=False)


@add(HEADS)
def classes_of_images(x, w, y):
    return F.cross_entropy(F.linear(x.flatten(0, 1), w, w[:, 0]), y.flatten(), label_smoothing=0.1)


@add(HEADS)
def two_towers(x, w, y):
    queries, documents = F.normalize(x.flatten(0, 1), dim=-1), F.normalize(w, dim=-1)
    return F.cross_entropy(queries @ documents.t() / 0.05, y.flatten())


@add(HEADS)
def autocast_head(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(x, w)
    return F.cross_entropy(logits.float().view(-1, V), y.view(-1))


@add(HEADS)
def padded_vocabulary(x, w, y):
    return F.cross_entropy(F.linear(x, w)[..., : V - 20].flatten(0, 1), y.flatten() % (V - 20))


@add(RETURNED)
def loss_and_logits(x, w, y):
    logits = x @ w.t()
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits


@add(RETURNED)
def loss_and_upcast_logits(x, w, y):
    logits = F.linear(x, w).double()
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits


@add(RETURNED)
def shifted_loss_and_logits(x, w, y):
    logits = F.linear(x, w)
    shifted = logits[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, V), y[..., 1:].contiguous().view(-1)), logits


@add(RETURNED)
def log_probabilities_and_logits(x, w, y):
    logits = x @ w.t()
    return logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1), logits


@add(RETURNED)
def loss_and_detached_logits(x, w, y):
    logits = x @ w.t()
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits.detach()


@add(RETURNED)
def loss_and_views_of_logits(x, w, y):
    logits = x @ w.t()
    return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits.transpose(0, 1)
