"""Results for each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from losses.programs import IGNORED, Program, add, flat

PER_TOKEN: dict[str, Program] = {}


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
