"""A few random programs; `python tests/fuzz.py` runs as many as one likes, and shrinks what fails."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from fuzzing.check import FAILED, OK, check
from fuzzing.generate import generate

EXAMPLES, PARTS = 300, 6


@pytest.fixture
def frugal() -> Iterator[None]:
    """One thread for tensors this small, and few collections: each would walk all that torch holds."""
    threads, thresholds = torch.get_num_threads(), gc.get_threshold()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    yield
    torch.set_num_threads(threads)
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.mark.usefixtures("frugal")
@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs(part: int) -> None:
    failed, held, looped = [], 0, 0
    for seed in range(part, EXAMPLES, PARTS):
        program = generate(seed, small=True)
        if program is None:
            continue
        outcome = check(program, "eager")
        held += outcome.kind == OK
        looped += outcome.looped > 0
        if outcome.kind == FAILED:
            failed.append(f"python tests/fuzz.py --small --inner eager --example {seed}: {outcome.signature}")
    assert not failed, "\n" + "\n".join(failed)
    assert held > EXAMPLES / PARTS * 0.9, "most programs are left out"
    assert looped > held / 2, "too few loops to prove anything"
