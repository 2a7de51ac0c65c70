"""Heads that are tied, frozen, adapted, or several; logits that are returned."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from losses.programs import Program, V, add, flat

HEADS: dict[str, Program] = {}
RETURNED: dict[str, Program] = {}


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
def loss_of_rows_and_logits(x, w, y):
    logits = x.flatten(0, 1) @ w.t()
    return F.cross_entropy(logits, y.flatten()), logits


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
