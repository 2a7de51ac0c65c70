"""The examples for several ranks, on the ranks of a test: gradients beside those of one process, and training."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
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


def outcomes(flags: list[tuple[str, ...]], rows: list[str]) -> tuple[list[dict[str, Any]], dict[Any, float]]:
    """Run the example with each of some flags, and the methods of some rows of the benchmark."""
    with frugal():
        return [outcome(flag) for flag in flags], methods(rows)


def methods(rows: list[str]) -> dict[tuple[str, str], float]:
    """The largest error of loss and gradients of each method of examples/benchmarks/fsdp.py, in some of its rows."""
    sys.path.append(str(Path(train_lm.__file__).parent / "benchmarks"))
    import eager_recipe
    import fsdp
    import fsdp_methods

    found: dict[tuple[str, str], float] = {}
    for row in rows:
        way = fsdp.WAYS[row]
        ranks = train_fsdp.Ranks.of(DEVICE, way, 2 if way else 1)
        preset = replace(fsdp.TINY, layers=1, length=64)
        with mock.patch.object(eager_recipe, "MLP_TILE", 20), mock.patch.object(eager_recipe, "LOSS_CHUNK", 10):
            with mock.patch.object(torch, "compile", partial(without_inductor, torch.compile)):
                model = fsdp_methods.Sharded(preset, DEVICE, ranks, dynamic=False, chunk_tokens=16)
            for method in fsdp.METHODS:
                model.use(method)
                found[row, method] = max(errors_of(preset, model, ranks))
    return found


def without_inductor(compiler: Any, fn: Any, backend: Any = "aot_eager", options: Any = None, **how: Any) -> Any:
    options = {"options": {**options, "inner": "aot_eager"}} if options else {}
    return compiler(fn, backend=backend, **options, **how)


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
