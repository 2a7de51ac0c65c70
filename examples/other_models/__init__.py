"""Tiny random models of packages beside transformers, with inputs and a loss: those that are installed are trained."""

from __future__ import annotations

from other_models.case import OtherCase
from other_models.diffusion import diffusion_cases
from other_models.images import image_cases
from other_models.language import language_cases


def other_cases() -> tuple[list[OtherCase], list[str]]:
    """Return the models of the packages that are installed, and the names of the packages that are not."""
    found = [*language_cases(), *image_cases(), *diffusion_cases()]
    missing = sorted({case.package for case in found if not case.installed})
    return [case for case in found if case.installed], missing
