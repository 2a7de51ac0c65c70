"""Cross-entropy with everything that it takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from losses.programs import IGNORED, Program, V, add, flat

CROSS_ENTROPY: dict[str, Program] = {}


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
