"""Distillation: a teacher's head stands in the same graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from losses.programs import IGNORED, Program, V, add

DISTILLATION: dict[str, Program] = {}


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


def probabilities_and_log_probabilities(x, w):
    student, teacher = student_and_teacher(x, w)
    return teacher.softmax(-1), student.log_softmax(-1)


@add(DISTILLATION)
def soft_targets_by_einsum(x, w, y):
    return -torch.einsum("btv,btv->bt", *probabilities_and_log_probabilities(x, w)).mean()


@add(DISTILLATION)
def soft_targets_by_matmul(x, w, y):
    p, log_q = probabilities_and_log_probabilities(x, w)
    each = (p.unsqueeze(-2) @ log_q.unsqueeze(-1)).flatten(1)
    return -(each * (y != IGNORED)).sum() / y.numel()


@add(DISTILLATION)
def soft_targets_by_bmm(x, w, y):
    p, log_q = (z.flatten(0, 1) for z in probabilities_and_log_probabilities(x, w))
    return -torch.bmm(p[:, None], log_q[:, :, None]).mean()


@add(DISTILLATION)
def soft_targets_by_one_dot_product(x, w, y):
    p, log_q = probabilities_and_log_probabilities(x, w)
    return -torch.dot(p.flatten(), log_q.flatten()) - torch.tensordot(p.square(), log_q, 3)


@add(DISTILLATION)
def expected_values(x, w, y):
    _, log_q = probabilities_and_log_probabilities(x, w)
    return torch.einsum("btv,v->bt", log_q.exp(), w[:, 0]).square().mean()
