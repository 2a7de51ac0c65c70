"""TRL's SFTTrainer: its own losses, whose head TRL runs in tiles, and the model's, whose head mst_fx loops.

    python examples/trainers/sft.py

TRL computes "nll" and "dft" in a function of its own that never makes all logits, and that torch.compile runs as it is,
between two graphs. mst_fx loops the MLPs around it. With the loss of transformers' Trainer, the head is in the graph.
"""

from __future__ import annotations

from typing import Any

import tiny
from transformers import Trainer
from trl import SFTConfig, SFTTrainer


class WithModelsLoss(SFTTrainer):
    """An SFTTrainer that takes the loss which the model computes; TRL's own metrics of tokens are not logged."""

    compute_loss = Trainer.compute_loss


def losses(kind: type[SFTTrainer], **arguments: Any) -> list[float]:
    chosen = SFTConfig(tiny.folder(), **{**tiny.STEPS, "bf16": False, **arguments})
    data, words = tiny.texts(text=40), tiny.tokenizer()
    return tiny.losses(kind(model=tiny.model(), args=chosen, train_dataset=data, processing_class=words))


def nll(compiled: bool) -> list[float]:
    return losses(SFTTrainer, torch_compile=compiled)


def dft(compiled: bool) -> list[float]:
    return losses(SFTTrainer, torch_compile=compiled, loss_type="dft")


def models_loss(compiled: bool) -> list[float]:
    return losses(WithModelsLoss, torch_compile=compiled)


MLPS = {"gated_mlp": tiny.LAYERS}
RUNS = (
    tiny.Run('SFT, loss_type="nll"', nll, MLPS),
    tiny.Run('SFT, loss_type="dft"', dft, MLPS),
    tiny.Run("SFT, the model's loss", models_loss, {**MLPS, "head": 1}, {"returned_logits": "drop"}),
)

if __name__ == "__main__":
    tiny.main(RUNS)
