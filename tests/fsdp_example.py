"""What examples/train_fsdp.py does on the ranks of a test: its gradients beside those of one process, and its training."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
import train_fsdp
import train_lm
from frugal import frugal
from torch.distributed.tensor import DTensor

import mst_fx

SIZES = ("--steps", "3", "--layers", "1", "--length", "64", "--chunk-tokens", "16")
DEVICE = torch.device("cpu")


def outcomes(flags: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Run the example with each of some flags."""
    with frugal():
        return [outcome(flag) for flag in flags]


def outcome(flags: tuple[str, ...]) -> dict[str, Any]:
    """The errors of loss and gradients beside one process, the losses of a training, and the patterns of the loops."""
    torch._dynamo.reset()
    with mock.patch.object(sys, "argv", ["train_fsdp.py", *SIZES, *flags]):
        preset, way, size, options = train_fsdp.parse()
    how = {"backend": mst_fx.backend, "options": {**options, "inner": "aot_eager", "strict": True}}
    ranks = train_fsdp.Ranks.of(DEVICE, way, size)
    told = len(mst_fx.reports())
    trainer = train_fsdp.Trainer(preset, DEVICE, ranks, **how)
    errors = errors_of(preset, trainer.model, ranks)
    peak = train_fsdp.train(trainer, preset, DEVICE)
    regions = [region.pattern for report in mst_fx.reports()[told:] for region in report.regions]
    return {"errors": errors, "losses": trainer.losses, "peak": peak, "regions": regions}


def errors_of(preset: train_lm.Preset, model: torch.nn.Module, ranks: train_fsdp.Ranks) -> list[float]:
    """The relative errors of the loss and of each gradient."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(preset.vocab, (ranks.data.size(), preset.length), generator=generator)
    truth = train_lm.build_model(preset, DEVICE).double()
    loss = truth(input_ids=texts, labels=texts).loss
    loss.backward()
    own = ranks.data.get_local_rank()
    with train_fsdp.slices(texts[own : own + 1], ranks) as given:
        found = model(**given)
        found.backward()
    total = found.detach()
    torch.distributed.all_reduce(total)
    grads = [whole(p.grad) for p in model.parameters()]
    model.zero_grad()
    pairs = [(total, loss.detach()), *zip(grads, (p.grad for p in truth.parameters()), strict=True)]
    return [float((one - other).norm() / other.norm()) for one, other in pairs]


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
