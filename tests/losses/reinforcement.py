"""Reinforcement learning and preferences, as the trainers write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from losses.programs import B, Program, add

REINFORCEMENT: dict[str, Program] = {}


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
