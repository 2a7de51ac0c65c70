"""Adapters of PEFT under transformers' Trainer: LoRA, rsLoRA, DoRA, and a head that is trained as it is.

    python examples/trainers/adapters.py

An adapter is part of its projection's region, on the MLP or on the head. DoRA's compiled graph breaks inside each of
its layers ...
"""

from __future__ import annotations

from functools import partial
from typing import Any

import tiny
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments


def losses(adapter: dict[str, Any], compiled: bool) -> list[float]:
    chosen = TrainingArguments(tiny.folder(), **tiny.STEPS, torch_compile=compiled)
    model = get_peft_model(tiny.model(), LoraConfig(r=4, init_lora_weights=False, **adapter))
    return tiny.losses(Trainer(model=model, args=chosen, train_dataset=tiny.tokens()))


ALL = {"gated_mlp": tiny.LAYERS, "head": 1}
EVERYWHERE = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]}
DROP = {"returned_logits": "drop"}
RUNS = (
    tiny.Run("LoRA on MLPs and head", partial(losses, EVERYWHERE), ALL, DROP),
    tiny.Run("rsLoRA on all projections", partial(losses, {"target_modules": "all-linear", "use_rslora": True}), ALL, DROP),
    tiny.Run("a whole head beside LoRA", partial(losses, {"target_modules": ["down_proj"], "modules_to_save": ["lm_head"]}), ALL, DROP),
    tiny.Run("DoRA", partial(losses, {**EVERYWHERE, "use_dora": True}), ALL, DROP),
)

if __name__ == "__main__":
    tiny.main(RUNS)
