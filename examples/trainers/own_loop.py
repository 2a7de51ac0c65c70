"""A loop written by hand, in the manner of torchtune: layers compiled one by one, and head and loss in one function.

    python examples/trainers/own_loop.py

Recipes of torchtune compile each layer of the decoder (`layer.compile()`), and the loss. A loss that is given hidden
states and the head's weight keeps head and loss in one graph.
"""

from __future__ import annotations

import tiny
import torch
import torch.nn.functional as F  # noqa: N812


def head_and_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the next tokens."""
    logits = F.linear(hidden[:, :-1], weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def train(compiled: bool) -> list[float]:
    model = tiny.model()
    loss_of = head_and_loss
    if compiled:
        for layer in model.model.layers:
            layer.compile()
        loss_of = torch.compile(head_and_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for batch in torch.utils.data.DataLoader(tiny.tokens(), batch_size=2):
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
        loss = loss_of(hidden, model.lm_head.weight, batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


RUNS = (tiny.Run("a loop by hand", train, {"gated_mlp": 1, "head": 1}),)

if __name__ == "__main__":
    tiny.main(RUNS)
