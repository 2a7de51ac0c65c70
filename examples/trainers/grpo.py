"""TRL's GRPOTrainer, with generation in the loop, by its flag `torch_compile`.

    python examples/trainers/grpo.py

Generation runs the model without its wrapper, so it is not compiled. TRL runs the head of the loss in tiles; mst_fx
loops the MLPs. Checkpointing is off: TRL would switch it for each generation, and compile anew each time (README.md).
"""

from __future__ import annotations

import tiny
from trl import GRPOConfig, GRPOTrainer


def low_digits(completions: list[str], **ignored: object) -> list[float]:
    """Reward completions for low digits."""
    return [-float(sum(map(int, filter(str.isdigit, text)))) for text in completions]


def grpo(compiled: bool) -> list[float]:
    generation = {"num_generations": 4, "max_completion_length": 8, "generation_kwargs": {"min_new_tokens": 8}}
    sizes = {**tiny.STEPS, "per_device_train_batch_size": 4, "num_iterations": 2, "max_steps": 4}
    exact = {"bf16": False, "gradient_checkpointing": False}
    chosen = GRPOConfig(tiny.folder(), **sizes, **generation, **exact, torch_compile=compiled)
    trainer = GRPOTrainer(
        model=tiny.model(),
        args=chosen,
        train_dataset=tiny.texts(prompt=8),
        reward_funcs=low_digits,
        processing_class=tiny.tokenizer(),
    )
    return tiny.losses(trainer)


RUNS = (tiny.Run("GRPO", grpo, {"gated_mlp": tiny.LAYERS}),)

if __name__ == "__main__":
    tiny.main(RUNS)
