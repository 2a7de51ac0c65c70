"""One model of a package: how it is built, one batch for it, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

HIDDEN, HEADS, LAYERS, DENSE, EXPERT, VOCAB = 64, 4, 2, 176, 112, 331
BATCH, LENGTH, IMAGE, PATCH, CLASSES = 2, 24, 32, 8, 10


@dataclass(frozen=True)
class OtherCase:
    """A model of another package than transformers.

    Attributes:
        package: the name by which it is imported.
        title: tells the model from the others of the package.
        build: gives the model, which returns its loss, and a batch for it.
    """

    package: str
    title: str
    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    vocabulary: int = VOCAB

    @property
    def name(self) -> str:
        """A unique name that can be a file name."""
        return f"{self.package}.{self.title}"

    @property
    def installed(self) -> bool:
        """Whether the package can be imported here."""
        return find_spec(self.package) is not None

    def training(self) -> tuple[nn.Module, dict[str, Any]]:
        """Return the model in training mode, without dropout, and one batch; random, and the same each time."""
        torch.manual_seed(0)
        model, batch = self.build()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return model.train(), batch


class Trained(nn.Module):
    """A model with its loss.

    Args:
        model: any module.
        loss: of the module and the batch.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, **batch: Any) -> torch.Tensor:
        """Return the loss."""
        return self.loss(self.model, **batch)


Built = tuple[nn.Module, dict[str, Any]]


def tokens(*shape: int, high: int = VOCAB) -> torch.Tensor:
    """Return random tokens; by default a batch of texts, one longer than a model reads."""
    return torch.randint(10, high, shape or (BATCH, LENGTH + 1))


def language_model(model: nn.Module, logits: Callable[[Any], torch.Tensor] = lambda out: out) -> Built:
    """Return a model of logits, trained to tell the next token."""

    def loss(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits(model(text[:, :-1])).flatten(0, 1), text[:, 1:].flatten())

    return Trained(model, loss), {"text": tokens()}


def classifier(model: nn.Module, size: int | tuple[int, ...] = IMAGE, channels: int = 3) -> Built:
    """Return a model of images, trained to tell one of ten classes."""
    sizes = (size, size) if isinstance(size, int) else size

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(images), labels)

    batch = {"images": torch.randn(BATCH, channels, *sizes), "labels": torch.randint(CLASSES, (BATCH,))}
    return Trained(model, loss), batch


def denoiser(model: nn.Module, first: Callable[[Any], torch.Tensor] = lambda out: out[0], **batch: Any) -> Built:
    """Return a model whose first result is trained to have small squares."""

    def loss(model: nn.Module, **batch: Any) -> torch.Tensor:
        return first(model(**batch)).square().mean()

    return Trained(model, loss), batch
