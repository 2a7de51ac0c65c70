"""The shift between tokens and labels in every spelling, and other cuts of the logits."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812

from losses.programs import IGNORED, Program, T, V, add, flat

SHIFTED: dict[str, Program] = {}


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
