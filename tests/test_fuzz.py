"""A few random programs; `python tests/fuzz.py` runs as many as one likes, and shrinks what fails."""

from __future__ import annotations

import pytest
from fuzzing.check import FAILED, check
from fuzzing.generate import generate

EXAMPLES, PARTS = 100, 4


@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs(part: int) -> None:
    failed, looped = [], 0
    for seed in range(part, EXAMPLES, PARTS):
        program = generate(seed, small=True)
        if program is None:
            continue
        outcome = check(program, "eager")
        looped += outcome.looped > 0
        if outcome.kind == FAILED:
            failed.append(f"python tests/fuzz.py --small --inner eager --example {seed}: {outcome.signature}")
    assert not failed, "\n" + "\n".join(failed)
    assert looped > EXAMPLES / PARTS / 5, "too few loops to prove anything"
