"""The losses of the comparison, as users write them: x [B, T, D] hidden states, w [V, D] head, y [B, T] labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

Loss = Callable[..., Any]
B, IGNORED = 2, -100
ROWS: dict[str, Loss] = {}


def row(title: str) -> Callable[[Loss], Loss]:
    def register(loss: Loss) -> Loss:
        ROWS[title] = loss
        return loss

    return register


def logits_of(x, w):
    return F.linear(x, w).float()


def flat(x, w, y):
    return logits_of(x, w).flatten(0, 1), y.flatten()


@row("cross-entropy")
def mean(x, w, y):
    return F.cross_entropy(*flat(x, w, y))


@row("sum / num_items_in_batch")
def num_items(x, w, y):
    return F.cross_entropy(*flat(x, w, y), reduction="sum") / (y != IGNORED).sum()


@row("label smoothing")
def label_smoothing(x, w, y):
    return F.cross_entropy(*flat(x, w, y), label_smoothing=0.1)


@row("class weights")
def class_weights(x, w, y):
    weight = torch.linspace(0.5, 1.5, w.shape[0], device=x.device)
    return F.cross_entropy(*flat(x, w, y), weight)


@row("class probabilities as targets")
def probabilities(x, w, y):
    classes = torch.arange(w.shape[0], device=x.device)
    targets = F.softmax(torch.cos(classes * (y.flatten().unsqueeze(-1) % 7).float() * 1e-3), -1)
    return F.cross_entropy(flat(x, w, y)[0], targets)


@row("soft-cap")
def soft_cap(x, w, y):
    return F.cross_entropy(torch.tanh(flat(x, w, y)[0] / 30) * 30, y.flatten())


@row("z-loss")
def z_loss(x, w, y):
    logits, labels = flat(x, w, y)
    return F.cross_entropy(logits, labels) + 1e-4 * logits.logsumexp(-1).square().mean()


@row("shift by slicing the logits")
def shifted(x, w, y):
    return F.cross_entropy(logits_of(x, w)[:, :-1].flatten(0, 1), y[:, 1:].flatten())


@row("classes in dim 1, [B, V, T]")
def images(x, w, y):
    return F.cross_entropy(logits_of(x, w).transpose(1, 2), y)


def chosen(logits, y):
    return torch.gather(logits.log_softmax(-1), -1, y.unsqueeze(-1)).squeeze(-1)


@row("log-probabilities of tokens")
def log_probabilities(x, w, y):
    return chosen(logits_of(x, w), y)


@row("log-probabilities and entropy")
def entropy(x, w, y):
    log_probs = logits_of(x, w).log_softmax(-1)
    return torch.gather(log_probs, -1, y.unsqueeze(-1)).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)


@row("loss and token accuracy")
def accuracy(x, w, y):
    logits, labels = flat(x, w, y)
    return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()


@row("GRPO, clipped, with a mask")
def grpo(x, w, y):
    log_probs = chosen(logits_of(x, w)[:, :-1], y[:, 1:])
    mask, old = (y[:, 1:] % 4 != 0).float(), log_probs.detach()
    advantages = torch.linspace(-0.5, 1, len(y), device=x.device).unsqueeze(1)
    ratio = torch.exp(log_probs - old)
    each = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return ((each * mask).sum(1) / mask.sum(1)).mean()


@row("DPO with a reference head")
def dpo(x, w, y):
    policy = chosen(logits_of(x, w)[:, :-1], y[:, 1:]).sum(1)
    with torch.no_grad():
        reference = chosen(logits_of(x * 0.9, w)[:, :-1], y[:, 1:]).sum(1)
    margin = policy - reference
    return -F.logsigmoid(1e-3 * (margin[: B // 2] - margin[B // 2 :])).mean()


@row("distillation: KL to a teacher head")
def distillation(x, w, y):
    with torch.no_grad():
        teacher = logits_of(x * 0.9, w).log_softmax(-1)
    return F.kl_div(logits_of(x, w).log_softmax(-1), teacher, log_target=True, reduction="sum") / y.numel()


@row("distillation: Jensen-Shannon")
def jensen_shannon(x, w, y):
    with torch.no_grad():
        p = logits_of(x * 0.9, w).log_softmax(-1)
    q = logits_of(x, w).log_softmax(-1)
    m = torch.log(0.5 * (p.exp() + q.exp()))
    kl = F.kl_div(m, p, log_target=True, reduction="none") + F.kl_div(m, q, log_target=True, reduction="none")
    return 0.5 * kl.sum(-1).mean()


@row("LoRA on the head")
def lora(x, w, y):
    a, b = w[:16], w[:, :16]
    logits = F.linear(x, w.detach()) + F.linear(F.linear(x, a), b)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


@row("two heads (multi-token prediction)")
def two_heads(x, w, y):
    second = F.cross_entropy(logits_of(x.tanh(), w)[:, :-2].flatten(0, 1), y[:, 2:].flatten())
    return shifted(x, w, y) + 0.3 * second


@row("MSE over the logits")
def squared_error(x, w, y):
    return F.mse_loss(logits_of(x, w), (y % 3).unsqueeze(-1).float().expand(-1, -1, w.shape[0]))


@row("the logits are returned, too")
def returned(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten()), logits
