"""Adapters of PEFT under transformers' Trainer: LoRA, rsLoRA, DoRA, and a head that is trained as it is.

    python examples/trainers/peft_adapters.py

An adapter is part of its projection's region, on the MLP or on the head. In a compiled graph, DoRA ends the graph in
each of its layers, where it asks for the name of the module that the type of the weight comes from. For weights that
are not quantised, the answer is the weight itself: `whole_graph` says so, and everything is looped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import tiny
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments


def losses(adapter: dict[str, Any], compiled: bool) -> list[float]:
    chosen = TrainingArguments(tiny.folder(), **tiny.STEPS, torch_compile=compiled)
    model = get_peft_model(tiny.model(), LoraConfig(r=4, init_lora_weights=False, **adapter))
    return tiny.losses(Trainer(model=model, args=chosen, train_dataset=tiny.tokens()))


def dora(adapter: dict[str, Any], compiled: bool) -> list[float]:
    with whole_graph():
        return losses({**adapter, "use_dora": True}, compiled)


@contextmanager
def whole_graph() -> Iterator[None]:
    """Let DoRA read weights as they are; leave it out where they are quantised."""
    with mock.patch("peft.tuners.lora.dora.dequantize_module_weight", lambda layer: layer.weight):
        yield


ALL = {"gated_mlp": tiny.LAYERS, "head": 1}
EVERYWHERE = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]}
RANK_STABLE = {"target_modules": "all-linear", "use_rslora": True}
WHOLE_HEAD = {"target_modules": ["down_proj"], "modules_to_save": ["lm_head"]}
DROP = {"returned_logits": "drop"}
RUNS = (
    tiny.Run("LoRA on MLPs and head", partial(losses, EVERYWHERE), ALL, DROP),
    tiny.Run("rsLoRA on all but the head", partial(losses, RANK_STABLE), ALL, DROP),
    tiny.Run("LoRA, the head trained as it is", partial(losses, WHOLE_HEAD), ALL, DROP),
    tiny.Run("DoRA on MLPs and head", partial(dora, EVERYWHERE), ALL, DROP),
)

if __name__ == "__main__":
    tiny.main(RUNS)
