"""A loop by hand with Accelerate: prepare, accumulate over batches, bfloat16 where autocast takes it.

    python examples/trainers/accelerate_loop.py

The model is compiled in place and prepared then. `Accelerator(dynamo_plugin=TorchDynamoPlugin(backend="inductor"))`
compiles what `prepare` gets, to the same effect; so does a compiled function of one's own that holds model and loss.
"""

from __future__ import annotations

import tiny
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader


def train(compiled: bool) -> list[float]:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = tiny.model()
    if compiled:
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = DataLoader(tiny.tokens(), batch_size=2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


ALL = {"gated_mlp": tiny.LAYERS, "head": 1}
RUNS = (tiny.Run("Accelerate, bfloat16", train, ALL, {"returned_logits": "drop"}, error=4e-3),)

if __name__ == "__main__":
    tiny.main(RUNS)
