"""What becomes of a program when it is compiled: does it hold, and if not, whose fault is it?"""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from fuzzing import harness
from fuzzing.generate import eager_results, loaded
from fuzzing.program import Program

OK, FAILED, TORCH, UNSTABLE = "ok", "failed", "torch's own", "unstable"
ABSENT = "zeros for no gradient, or none for zeros"


@dataclass(frozen=True)
class Outcome:
    """Of one program.

    Attributes:
        kind: "ok", "failed", "torch's own" (it fails in the same way without
            mst_fx) or "unstable" (rounding decides, in eager mode or between
            Inductor's kernels).
        signature: the kind of failure, short and without numbers.
        detail: the error.
        looped: number of loops.
    """

    kind: str
    signature: str = ""
    detail: str = ""
    looped: int = 0

    @property
    def said(self) -> str:
        """The signature without the place in mst_fx: the same failure in torch alone has none."""
        return re.sub(r" at [\w/]+\.py:\w+: ", ": ", self.signature)


def check(program: Program, inner: str) -> Outcome:
    """Compile a program with mst_fx, run it beside eager, and, if it fails, without mst_fx."""
    compiling = program.compiling(inner)
    failed = attempt(program, compiling)
    if failed.kind == OK:
        return failed
    absent = failed.signature == ABSENT  # zeros for none are AOTAutograd's, if it gets that far
    alone = {**compiling, "backend": "aot_eager" if absent and inner == "eager" else inner}
    del alone["options"]
    plain = attempt(program, alone)
    if plain.kind != OK and (absent or plain.said == failed.said):
        return Outcome(TORCH, plain.signature, plain.detail)
    if failed.signature.startswith("wrong") and (unstable(program) or kernels_round_apart(program, compiling, inner)):
        return Outcome(UNSTABLE, failed.signature, failed.detail)
    return failed


def attempt(program: Program, compiling: dict[str, Any]) -> Outcome:
    space = loaded(program)
    calls = len(program.lengths)
    try:
        looped = harness.compare(
            space["program"],
            space["inputs"],
            calls,
            compiling,
            program.backward,
            program.cotangent,
            program.relative,
        )
    except harness.DifferentError as error:
        said = str(error)
        kinds = {"internal error": "internal", "differs": f"wrong {said.split()[0]}", "None or zero": ABSENT}
        kind = next(kind for part, kind in kinds.items() if part in said)
        return Outcome(FAILED, f"{kind}: {shortened(said)}" if kind == "internal" else kind, said)
    except Exception as error:
        return Outcome(FAILED, signature(error), "".join(traceback.format_exception(error))[-3000:])
    return Outcome(OK, looped=looped)


def signature(error: Exception) -> str:
    """The exception that caused it, where in mst_fx it arose, and its first line without numbers and names."""
    while error.__cause__ is not None:
        error = error.__cause__
    inner = getattr(error, "inner_exception", None) or error
    frames = [f for f in traceback.extract_tb(inner.__traceback__) if "/mst_fx/" in f.filename]
    where = f" at {frames[-1].filename.split('/mst_fx/')[-1]}:{frames[-1].name}" if frames else ""
    return f"{type(inner).__name__}{where}: {shortened(str(inner))}"


def shortened(said: str) -> str:
    """The first line, without numbers and names."""
    lines = [line for line in said.splitlines() if line.strip()] or [""]
    said = re.sub(r"\b[a-z_]+_\d+\b|\b[a-z]\d+\b", "v", lines[0])
    return re.sub(r"\d+(\.\d+)?", "0", re.sub(r"\[[^\[\]]*\]|\([^()]*\)", "[..]", said))[:110]


def unstable(program: Program) -> bool:
    """Whether noise of the size of rounding moves eager's results as far."""
    exact = eager_results(program)
    try:
        harness.NOISE[0] = 3e-15
        noisy = eager_results(program)
    finally:
        harness.NOISE[0] = 0.0
    return any(
        harness.farthest(a, {k: v for k, v in b.items() if not k.startswith("argument")}, program.relative)[0]
        for a, b in zip(noisy, exact, strict=True)
    )


def kernels_round_apart(program: Program, compiling: dict[str, Any], inner: str) -> bool:
    """Whether it holds where every kernel of Inductor computes number by number.

    Inductor computes a value again in each kernel that reads it, in one as a vector and in another number by number,
    and their `tanh` differ in the last bit. A maximum is then equal to none of the values it was taken of, and its
    gradient is lost: seen with torch 2.11 alone, where a length is unbacked.
    """
    if inner != "inductor":
        return False
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        return attempt(program, compiling).kind == OK
