"""The Trainer of transformers: by its flag `torch_compile`, or with its whole loss in one compiled function.

    python examples/trainers/transformers_trainer.py

The flag compiles the model. The model computes its own loss, so head and loss are in one graph, and the head is looped.
The trainer computes other losses itself, of the logits that the model returns: `label_smoothing_factor`, or a
`compute_loss_func`. Compile `compute_loss` for these.
"""

from __future__ import annotations

from typing import Any

import tiny
import torch
from transformers import Trainer, TrainingArguments


def trainer(**arguments: Any) -> Trainer:
    chosen = TrainingArguments(tiny.folder(), **{**tiny.STEPS, **arguments})
    return Trainer(model=tiny.model(), args=chosen, train_dataset=tiny.tokens())


def by_flag(compiled: bool) -> list[float]:
    return tiny.losses(trainer(torch_compile=compiled))


def with_any_loss(compiled: bool) -> list[float]:
    made = trainer(label_smoothing_factor=0.1, gradient_accumulation_steps=2)
    if compiled:
        made.compute_loss = torch.compile(made.compute_loss)
    return tiny.losses(made)


ALL = {"gated_mlp": tiny.LAYERS, "head": 1}
RUNS = (
    tiny.Run("torch_compile=True", by_flag, ALL, {"returned_logits": "drop"}),
    tiny.Run("label smoothing over two batches, compute_loss compiled", with_any_loss, ALL),
)

if __name__ == "__main__":
    tiny.main(RUNS)
