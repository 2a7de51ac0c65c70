"""Heads that are tied, frozen, adapted, or several; logits that are returned."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint as checkpoint_of_torch

from losses.programs import Program, V, add, flat

HEADS: dict[str, Program] = {}
CHECKPOINTED: dict[str, Program] = {}
RETURNED: dict[str, Program] = {}


def checkpoint(fn, *args):
    return checkpoint_of_torch(fn, *args, use_reentrant=False)


def cross_entropy(x, w, y):
    return F.cross_entropy(*flat(x, w, y))


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
    return checkpoint(cross_entropy, x, w, y)


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


@add(CHECKPOINTED)
def around_the_head(x, w, y):
    return F.cross_entropy(checkpoint(F.linear, x, w).flatten(0, 1), y.flatten())


@add(CHECKPOINTED)
def around_the_loss(x, w, y):
    return checkpoint(F.cross_entropy, *flat(x, w, y))


@add(CHECKPOINTED)
def around_the_activation(x, w, y):
    logits = checkpoint(lambda z: torch.tanh(z / 30) * 30, F.linear(x, w))
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@add(CHECKPOINTED)
def around_head_and_loss_in_turn(x, w, y):
    return checkpoint(F.cross_entropy, checkpoint(lambda x, w: flat(x, w, y)[0], x, w), y.flatten())


@add(CHECKPOINTED)
def around_several_heads(x, w, y):
    return sum(checkpoint(cross_entropy, x, w.roll(shift), y) * (shift + 1) for shift in range(3))


@add(CHECKPOINTED)
def around_several_projections(x, w, y):
    logits = [checkpoint(F.linear, x, w.roll(shift)).flatten(0, 1) for shift in range(3)]
    return sum(F.cross_entropy(z, y.flatten()) for z in logits)


@add(CHECKPOINTED)
def around_norm_and_head(x, w, y):
    logits, normed = checkpoint(lambda x, w: (F.linear(n := F.rms_norm(x, x.shape[-1:]), w), n), x, w)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten()) + normed.square().mean()


@add(CHECKPOINTED)
def around_log_probabilities(x, w, y):
    scores = checkpoint(lambda z: z.log_softmax(-1), F.linear(x, w))
    return checkpoint(lambda scores, y: scores.gather(-1, y.unsqueeze(-1)).squeeze(-1), scores, y)
