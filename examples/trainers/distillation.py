"""TRL's distillation: DistillationTrainer, which runs both heads in tiles, and GKDTrainer, whose heads mst_fx loops.

    python examples/trainers/distillation.py

DistillationTrainer calls the model past the wrapper that `torch_compile=True` gives it, so the flag has no effect:
compile `compute_loss`. GKDTrainer computes its divergence of the logits of both models, in `compute_loss` as well: with
the mask as below, both heads are in one loop.
"""

from __future__ import annotations

import tiny
import torch
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

EXACT = {**tiny.STEPS, "bf16": False, "gradient_checkpointing": False}


class MaskedGKD(GKDTrainer):
    """A GKDTrainer that masks the sums of each token: the shape of `jsd[mask]` depends on data, which ends a graph."""

    @staticmethod
    def generalized_jsd_loss(student_logits, teacher_logits, labels=None, num_items_in_batch=None, **options):
        """Return the mean divergence of the tokens that have a label."""
        each = GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, reduction="none", **options).sum(-1)
        kept = labels != -100
        return (each * kept).sum() / (kept.sum() if num_items_in_batch is None else num_items_in_batch)


def teacher():
    return tiny.model(hidden_size=48).eval()


def distillation(compiled: bool) -> list[float]:
    chosen = DistillationConfig(tiny.folder(), **EXACT, max_completion_length=8)
    trainer = DistillationTrainer(
        model=tiny.model(),
        teacher_model=teacher(),
        args=chosen,
        train_dataset=tiny.texts(prompt=8),
        processing_class=tiny.tokenizer(),
    )
    if compiled:
        trainer.compute_loss = torch.compile(trainer.compute_loss)
    return tiny.losses(trainer)


def gkd(compiled: bool) -> list[float]:
    chosen = GKDConfig(tiny.folder(), **EXACT, lmbda=0.0)
    trainer = MaskedGKD(
        model=tiny.model(),
        teacher_model=teacher(),
        args=chosen,
        train_dataset=tiny.conversations(),
        processing_class=tiny.tokenizer(),
    )
    if compiled:
        trainer.compute_loss = torch.compile(trainer.compute_loss)
    return tiny.losses(trainer)


RUNS = (
    tiny.Run("distillation", distillation, {"gated_mlp": 2 * tiny.LAYERS}),
    tiny.Run("GKD", gkd, {"gated_mlp": 2 * tiny.LAYERS, "head": 1}),
)

if __name__ == "__main__":
    tiny.main(RUNS)
