"""Derivatives of our own, where autograd's formula reads a wide value once more than needed.

Axes: T tokens, V classes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch.fx import Node, map_arg

from mst_fx.bodies.log_softmax import exp

aten = torch.ops.aten


def reads_log_softmax(node: Node, inside: Container[Node]) -> bool:
    """Return whether a node is the negative log-likelihood of rows of a log-softmax among `inside`."""
    if node.target != aten.nll_loss_forward.default:
        return False
    scores: Any = node.args[0]
    return scores in inside and scores.target == aten._log_softmax.default and scores.meta["val"].dim() == 2


def run_on_logits(node: Node, env: Mapping[Node, Any]) -> Any:
    """Return the values of such a node; its gradient goes to the logits, past the log-softmax."""
    scores: Any = node.args[0]
    arguments: Any = map_arg(node.args, env.get)
    return _Picked.apply(env[scores.args[0]], arguments[0].detach(), *arguments[1:])


class _Picked(torch.autograd.Function):
    """The gradient of the logits is (onehot - softmax) times the gradient of the row's picked score.

    Autograd makes rows [T, V] with one entry each, and the derivative of log-softmax sums up each row: the sum is that
    entry.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        scores_TV: torch.Tensor,
        target_T: torch.Tensor,
        weight_V: torch.Tensor | None,
        reduction: int,
        ignore_index: int,
    ) -> Any:
        loss, total = aten.nll_loss_forward.default(scores_TV, target_T, weight_V, reduction, ignore_index)
        ctx.save_for_backward(scores_TV, target_T, weight_V)
        ctx.ignore_index, ctx.dtype = ignore_index, logits_TV.dtype
        ctx.mark_non_differentiable(total)
        return loss, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> Any:
        scores_TV, target_T, weight_V = ctx.saved_tensors
        wide = torch.promote_types(scores_TV.dtype, torch.float32)
        counts_T = target_T != ctx.ignore_index
        label_T = torch.where(counts_T, target_T, 0)
        each = grad.to(wide) if weight_V is None else grad.to(wide) * weight_V[label_T]
        each_T1 = torch.where(counts_T, -each, 0).unsqueeze(1)
        classes_V = torch.arange(scores_TV.shape[1], dtype=torch.int32, device=scores_TV.device)
        hot_TV = classes_V == label_T.to(torch.int32).unsqueeze(1)
        grad_TV = (hot_TV.to(wide) - exp(scores_TV.to(wide))) * each_T1  # the difference of near numbers is exact
        return grad_TV.to(ctx.dtype), None, None, None, None, None
