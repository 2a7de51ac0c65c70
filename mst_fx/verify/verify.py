"""Option `verify`: run a region once, looped and as captured, before its loop goes into the graph.

The loop that runs is the one that is compiled, put into a graph by the same code; `excerpt` gives the region, `samples`
the numbers. The measure is the program's own nodes in float64: the loop may be as far from them as these nodes are in
the program's dtypes, plus a rounding. A loop that is further off is compared with the program on numbers that differ
in their last bit, `NUDGES` times: a value that is all cancellation, or a choice between two equals, changes as much
there, and is no fault. In half precision a second set of numbers has to show the fault, too.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from math import inf

import torch
from torch.fx import GraphModule, Node

from mst_fx.bodies.call import Call, assembled
from mst_fx.bodies.splice import Replacement, loop
from mst_fx.bodies.work import Work
from mst_fx.core.config import Config
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.torch_private.captured import is_transformed
from mst_fx.core.values import fake_value, has_gradient, is_fake
from mst_fx.recognise.rebuild import Edit, rebuilt
from mst_fx.recognise.region import Region
from mst_fx.verify.excerpt import Excerpt, excerpt, first_line
from mst_fx.verify.samples import KINDS, Samples, as_given, draw, in_float64, live_ins_of, lowest_precision, nudged
from mst_fx.verify.trial import InFloat64, Outcome, Program, as_captured, as_looped, isolated, outcomes

ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}
"""The loop's error (norm of the difference over norm of the truth) may exceed eager's by this; else by eps."""
SMALL = 1e-6
"""A value below this share of the largest counts as zero."""
FACTOR = 4
"""The loop's error may be this many times that of eager, or that on numbers that differ in their last bit."""
NUDGES = 4
"""Number of runs on such numbers: where a value is a single number, one run may change it little by chance."""


@dataclass(frozen=True)
class Verified:
    """The outcome of a region's check.

    Attributes:
        holds: True for a loop that ran and is right, False for one that could not run.
        text: at which sizes it ran, or why it could not.
    """

    holds: bool
    text: str


def verified(region: Region, work: Work, call: Call, config: Config) -> Verified:
    """Run a region and its loop, and compare outputs and gradients.

    Args:
        region: the region to loop.
        work: the work of its loop.
        call: the call that goes into the graph.
        config: options of the compile.

    Raises:
        Refusal: the loop gives other values than the region (DIFFERS).
    """
    try:
        with isolated():
            return _verified(region, work, call, config)
    except Refusal:
        raise
    except Exception as error:  # the program may not take these numbers; or it is a bug of ours
        return Verified(False, first_line(error))


def _verified(region: Region, work: Work, call: Call, config: Config) -> Verified:
    foreign = [node for node in region.live_ins if not _is_plain(fake_value(node))]
    if foreign:
        return Verified(False, f"it reads {foreign[0]}, a {type(fake_value(foreign[0])).__name__}")
    found = excerpt(region, work, config)
    if isinstance(found, str):
        return Verified(False, found)
    detached = found.region.returned if config.returned_logits == "detach" else ()
    looped = _looped(found, call if found.work is work else None, config, detached)
    for seed in range(1 if lowest_precision(found) in ROUNDING else 2):
        fault = _fault(found, looped, seed, detached)
        if not fault:
            return Verified(True, found.sizes)
    raise Refusal(Reason.DIFFERS, region.last, f"on random numbers of {found.sizes}, its loop differs: {fault}")


def _is_plain(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return is_fake(value) and not is_transformed(value)
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat)


def _looped(found: Excerpt, call: Call | None, config: Config, detached: tuple[Node, ...]) -> GraphModule:
    """Return the excerpt's graph with its loop: the compiled one, if it has several chunks at this length."""
    if call is None or _longest(call) >= found.length:
        length = max(1, (found.length - 1) // 2)  # two chunks, and mostly a ragged one
        call = assembled(found.work, length, length, config.accumulate)
    replacement = Replacement(found.region, found.work.stages, call)
    return rebuilt(found.region.owner, [Edit(found.region, partial(loop, replacement=replacement), detached)])


def _longest(call: Call) -> int:
    """Return the positions of the longest chunk."""
    return max(spec[1] for spec in (call.spec.forward_spec, call.spec.backward_spec) if spec)


def _fault(found: Excerpt, looped: GraphModule, seed: int, detached: Container[Node]) -> str:
    """Return what differs and by how much, "" where nothing does.

    Raises:
        Exception: the program's own, where it cannot compute with any kind of numbers.
    """
    program = as_captured(found)
    samples, truth = _truth(found, program, seed, detached)
    (eager,) = outcomes(program, live_ins_of(found, samples, as_given), samples.upstream)
    try:
        made = outcomes(as_looped(looped), live_ins_of(found, samples, as_given), samples.upstream, layouts=2)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"it raises {first_line(error)}"
    names = _names(found.region)
    for ours in made:
        if ours.likes != eager.likes:
            unlike = next(i for i, (a, b) in enumerate(zip(ours.likes, eager.likes, strict=True)) if a != b)
            return f"{names[unlike]} is {_told(*ours.likes[unlike])}, as captured {_told(*eager.likes[unlike])}"
    coarse = lowest_precision(found)
    rounding = ROUNDING.get(coarse, torch.finfo(coarse).eps)
    allowed = [error + rounding for error in _errors(truth, eager, eager)]
    errors = [max(pair) for pair in zip(*(_errors(truth, eager, ours) for ours in made), strict=True)]
    if all(error <= most for error, most in zip(errors, allowed, strict=True)):
        return ""
    others = [eager]
    for number in range(NUDGES):
        nudge = partial(nudged, eps=torch.finfo(coarse).eps, seed=number)
        others += outcomes(program, live_ins_of(found, samples, nudge), samples.upstream)
    own = [max(each) for each in zip(*(_errors(truth, eager, other) for other in others), strict=True)]
    wrong = [
        f"{name} by {error:.1e} (eager by {least:.1e})"
        for name, error, least in zip(names, errors, own, strict=True)
        if not error <= FACTOR * least + rounding
    ]
    return ", ".join(wrong)


def _names(region: Region) -> list[str]:
    """Return the names of the values of an outcome."""
    leaves = [node for node in region.live_ins if has_gradient(node)]
    return [f"{node.name}" for node in region.outputs] + [f"the gradient of {node.name}" for node in leaves]


def _told(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def _truth(found: Excerpt, program: Program, seed: int, detached: Container[Node]) -> tuple[Samples, Outcome]:
    """Return numbers that the program can compute with, and its outcome in float64, finite if one kind gives that."""
    failure: Exception = ArithmeticError("no value is finite")
    usable: list[tuple[Samples, Outcome]] = []
    for kind in KINDS:
        samples = draw(found, kind, seed, detached)
        try:
            with InFloat64():
                (truth,) = outcomes(program, live_ins_of(found, samples, in_float64), samples.upstream)
        except Exception as error:
            failure = error
            continue
        if all(value.isfinite().all() for value in truth.all):
            return samples, truth
        usable += [(samples, truth)] if any(value.isfinite().any() for value in truth.all) else []
    if not usable:
        raise failure
    return usable[0]


def _errors(truth: Outcome, eager: Outcome, outcome: Outcome) -> list[float]:
    """Return the error of each value over its norm, where truth and eager are finite; of integers, the wrong share."""
    sizes = [_rms(value[value.isfinite()]) for value in truth.all]
    floor = SMALL * max(sizes, default=0.0) or 1.0
    triples = zip(truth.all, eager.all, outcome.all, strict=True)
    return [_error(*values, max(size, floor)) for values, size in zip(triples, sizes, strict=True)]


def _error(truth: torch.Tensor, eager: torch.Tensor, value: torch.Tensor, size: float) -> float:
    finite = truth.isfinite() & eager.isfinite()
    if not bool(value[finite].isfinite().all()):
        return inf
    if not truth.is_floating_point():
        return float((value != truth).double().mean()) if truth.numel() else 0.0
    return _rms((value - truth)[finite]) / size


def _rms(value: torch.Tensor) -> float:
    return float(value.double().square().mean().sqrt()) if value.numel() else 0.0
