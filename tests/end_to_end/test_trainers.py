"""Trainers as they come: each example trains the same with mst_fx as without, and loops what it says."""

from __future__ import annotations

import importlib

import pytest
from through_inductor import without_code

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

NEEDS = {
    "transformers_trainer": (),
    "peft_adapters": ("peft",),
    "accelerate_loop": (),
    "lightning_module": ("lightning",),
    "own_loop": (),
    "sft": ("trl",),
    "preferences": ("trl",),
    "grpo": ("trl",),
    "distillation": ("trl",),
}


def example(name):
    """The module of an example, if what it needs is installed."""
    for package in NEEDS[name]:
        pytest.importorskip(package)
    return importlib.import_module(name)


@pytest.mark.parametrize("name", NEEDS)
def test_losses_are_the_same_and_all_is_looped(name):
    import tiny

    for run in example(name).RUNS:
        with without_code():
            found = tiny.compared(run)
        assert found.difference <= run.error, f"{run.title}: {found.plain} and {found.ours}"
        assert found.looped == run.looped, f"{run.title}: {found.report}"
        assert len(set(found.plain)) > 1, f"{run.title}: the losses show no training"


def test_with_code_of_inductor():
    import tiny

    found = tiny.compared(example("transformers_trainer").RUNS[0])
    assert found.difference <= 2e-6
    assert found.looped == {"gated_mlp": tiny.LAYERS, "head": 1}
