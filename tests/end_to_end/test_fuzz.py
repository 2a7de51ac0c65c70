"""A few random programs; `python tests/fuzz.py` runs as many as one likes, and shrinks what fails."""

from __future__ import annotations

import pytest
from frugal import quiet
from fuzzing.check import FAILED, OK, check
from fuzzing.generate import generate

pytestmark = pytest.mark.slow

EXAMPLES, PARTS = 120, 4


@pytest.mark.parametrize("part", range(PARTS))
@quiet()
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
