"""A LightningModule under Lightning's Trainer: compile the module, and its whole training_step is in the graph.

python examples/trainers/lightning_module.py
"""

from __future__ import annotations

import logging

import lightning
import tiny
import torch
from torch.utils.data import DataLoader


class Causal(lightning.LightningModule):
    """A language model that remembers its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.seen = tiny.model(), []

    def training_step(self, batch, index):
        """Return the loss that the model computes."""
        return self.model(**batch).loss

    def on_train_batch_end(self, outputs, batch, index):
        """Remember the loss."""
        self.seen.append(outputs["loss"].item())

    def configure_optimizers(self):
        """Take steps as large as the gradients."""
        return torch.optim.SGD(self.parameters(), lr=0.5)


def train(compiled: bool) -> list[float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Causal()
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=3, **off)
    trainer.fit(torch.compile(module) if compiled else module, DataLoader(tiny.tokens(), batch_size=2))
    return module.seen


RUNS = (tiny.Run("Lightning", train, {"gated_mlp": tiny.LAYERS, "head": 1}),)

if __name__ == "__main__":
    tiny.main(RUNS)
