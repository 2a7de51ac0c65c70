"""TRL's trainers of preferences: DPOTrainer, KTOTrainer and RewardTrainer, each by its flag `torch_compile`.

    python examples/trainers/preferences.py

TRL runs the heads of DPO and KTO in tiles, and a reward model has none: mst_fx loops the MLPs, those of the reference
model, which needs no gradient, too. Checkpointing is off: TRL would switch it at each step, and compile anew each time
(README.md). KTO runs the reference in a second form, with fewer results, for its estimate of the divergence.
"""

from __future__ import annotations

from typing import Any

import tiny
from datasets import Dataset
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer


def losses(kind: Any, config: Any, data: Dataset, compiled: bool, **models: Any) -> list[float]:
    chosen = config(tiny.folder(), **tiny.STEPS, bf16=False, gradient_checkpointing=False, torch_compile=compiled)
    return tiny.losses(kind(**models, args=chosen, train_dataset=data, processing_class=tiny.tokenizer()))


def dpo(compiled: bool) -> list[float]:
    data = tiny.texts(prompt=16, chosen=16, rejected=16)
    return losses(DPOTrainer, DPOConfig, data, compiled, model=tiny.model(), ref_model=tiny.model())


def kto(compiled: bool) -> list[float]:
    data = tiny.texts(prompt=16, completion=16).add_column("label", [True, False] * 4)
    return losses(KTOTrainer, KTOConfig, data, compiled, model=tiny.model(), ref_model=tiny.model())


def reward(compiled: bool) -> list[float]:
    data = tiny.texts(chosen=32, rejected=32)
    model = tiny.model(LlamaForSequenceClassification, num_labels=1)
    return losses(RewardTrainer, RewardConfig, data, compiled, model=model)


RUNS = (
    tiny.Run("DPO", dpo, {"gated_mlp": 2 * tiny.LAYERS}),
    tiny.Run("KTO", kto, {"gated_mlp": 3 * tiny.LAYERS}),
    tiny.Run("reward model", reward, {"gated_mlp": tiny.LAYERS}),
)

if __name__ == "__main__":
    tiny.main(RUNS)
