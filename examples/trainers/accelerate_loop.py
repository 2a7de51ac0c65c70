"""A loop by hand with Accelerate: prepare, accumulate over batches, bfloat16 where autocast takes it.

    python examples/trainers/accelerate_loop.py

`Accelerator(dynamo_plugin=...)` compiles what `prepare` gets, by Inductor. A function of one's own that holds model and
loss can be compiled just as well.
"""

from __future__ import annotations

import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from torch.utils.data import DataLoader


def train(compiled: bool) -> list[float]:
    plugin = TorchDynamoPlugin(backend="inductor" if compiled else "no")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2, dynamo_plugin=plugin)
    model = tiny.model()
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


RUNS = (tiny.Run("Accelerate", train, {"gated_mlp": tiny.LAYERS, "head": 1}, {"returned_logits": "drop"}),)

if __name__ == "__main__":
    tiny.main(RUNS)
