"""Logits that are read in pieces along the tokens, and joined again; classes that are picked or marked by indices."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from losses.programs import B, Program, T, add, flat

PIECES: dict[str, Program] = {}
MARKED: dict[str, Program] = {}


@add(PIECES)
def sums_of_splits(x, w, y):
    logits, labels = flat(x, w, y)
    parts = zip(logits.split(48), labels.split(48), strict=True)
    return sum(F.cross_entropy(z, t, reduction="sum") for z, t in parts) / y.numel()


@add(PIECES)
def means_of_chunks(x, w, y):
    logits, labels = flat(x, w, y)
    weights = w[:, 0].detach().exp()
    parts = zip(logits.chunk(5), labels.chunk(5), strict=True)
    return sum(F.cross_entropy(z, t, weights, ignore_index=3, label_smoothing=0.1) for z, t in parts)


@add(PIECES)
def many_short_pieces(x, w, y):
    logits, labels = flat(x, w, y)
    parts = zip(logits.split(16), labels.split(16), strict=True)
    return torch.stack([F.cross_entropy(z, t) for z, t in parts]).square().mean()


@add(PIECES)
def sequence_by_sequence(x, w, y):
    return torch.stack([F.cross_entropy(z, t) for z, t in zip(F.linear(x, w), y, strict=True)]).mean()


@add(PIECES)
def ranges_with_a_weight_each(x, w, y):
    logits = F.linear(x, w, w[:, 0]) / 0.7
    ranges = [(i, a, b) for i in range(B) for a, b in ((0, 24), (24, T))]
    return sum(F.cross_entropy(logits[i, a:b], y[i, a:b]) * (i + a + 1) for i, a, b in ranges)


@add(PIECES)
def sequences_of_given_lengths(x, w, y):
    logits = F.linear(x, w, w[:, 0]) / 0.7
    lengths = enumerate((100, 70))
    return sum(F.cross_entropy(logits[i, 3:n], y[i, 3:n]) for i, n in lengths)


@add(PIECES)
def shifted_sequence_by_sequence(x, w, y):
    return sum(F.cross_entropy(z[:-1], t[1:]) for z, t in zip(F.linear(x, w), y, strict=True))


@add(PIECES)
def joined_along_the_tokens(x, w, y):
    pieces = F.linear(x, w).split(50, dim=1)
    return torch.cat([z.logsumexp(-1) for z in pieces], 1).square().mean()


@add(PIECES)
def log_probabilities_joined_again(x, w, y):
    logits, labels = flat(x, w, y)
    return F.nll_loss(torch.cat([z.log_softmax(-1) for z in logits.split(64)]), labels)


@add(PIECES)
def picked_log_probabilities_of_each_sequence(x, w, y):
    parts = zip(F.linear(x, w), y, strict=True)
    return torch.stack([z.log_softmax(-1).gather(-1, t[:, None])[:, 0].sum() for z, t in parts])


@add(PIECES)
def divergence_of_each_sequence(x, w, y):
    student, teacher = F.linear(x, w), F.linear(x.detach(), w.detach().flip(0))
    parts = zip(student.log_softmax(-1).unbind(), teacher.softmax(-1).unbind(), strict=True)
    return sum(F.kl_div(log_q, p, reduction="sum") * (1 + i) for i, (log_q, p) in enumerate(parts))


@add(PIECES)
def entropy_chunk_by_chunk(x, w, y):
    logits, labels = flat(x, w, y)
    lse = torch.cat([z.logsumexp(-1) for z in logits.split(48)])
    with torch.no_grad():
        entropy = torch.cat([-(z.softmax(-1) * z.log_softmax(-1)).sum(-1) for z in logits.split(48)])
    return (lse - logits.gather(-1, labels[:, None])[:, 0] * (entropy > 1)).mean()


@add(PIECES)
def entropy_of_given_lengths(x, w, y):
    logits, labels = flat(x, w, y)
    with torch.no_grad():
        pieces = [z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1) for z in logits.split([100, 56, 100])]
    return (torch.cat(pieces) * logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]).mean()


@add(PIECES)
def entropy_into_a_buffer(x, w, y):
    logits, _ = flat(x, w, y)
    entropy = x.new_empty(B * T)
    with torch.no_grad():
        for start in range(0, B * T, 48):
            z = logits[start : start + 48]
            entropy[start : start + 48] = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    return (entropy * logits.logsumexp(-1)).mean()


@add(PIECES)
def scaled_in_place_before_the_pieces(x, w, y):
    logits = F.linear(x, w)
    logits /= 2.0
    return sum(F.cross_entropy(z, t) for z, t in zip(logits, y, strict=True))


@add(MARKED)
def marked_by_two_indices(x, w, y):
    logits, labels = flat(x, w, y)
    margin = torch.zeros_like(logits)
    margin[torch.arange(B * T), labels] = 1.5
    return F.cross_entropy(logits - margin, labels)


@add(MARKED)
def lowered_in_place_by_two_indices(x, w, y):
    logits, labels = flat(x, w, y)
    logits[torch.arange(B * T), labels] -= 0.3
    return F.cross_entropy(logits * 4, labels)


@add(MARKED)
def overwritten_by_two_indices(x, w, y):
    logits, labels = flat(x, w, y)
    best = logits.amax(-1)
    logits = logits.clone()
    logits[torch.arange(B * T), labels] = best
    return logits.logsumexp(-1).mean()


@add(MARKED)
def picked_by_three_indices(x, w, y):
    scores = F.linear(x, w).log_softmax(-1)
    return -scores[torch.arange(B)[:, None], torch.arange(T)[None], y].mean()


@add(MARKED)
def marked_by_scatter(x, w, y):
    logits = F.linear(x, w)
    targets = torch.zeros_like(logits).scatter_(-1, y[..., None], x[..., :1].detach().sigmoid())
    return F.binary_cross_entropy_with_logits(logits, targets)


@add(MARKED)
def padded_classes(x, w, y):
    logits = F.pad(F.linear(x, w), (0, 8), value=-30.0)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@add(MARKED)
def forbidden_classes(x, w, y):
    logits = F.linear(x, w)
    logits[..., 150:] = -1e4
    logits[:, :, 0] = 0.0
    return F.cross_entropy(logits.flatten(0, 1), y.flatten() % 150)
