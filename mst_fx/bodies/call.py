"""Work and the length of a chunk -> the bodies and the literals of one call of `mini_sequence`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mst_fx.bodies.body import Body, Gradients, forward_body, gradient_body
from mst_fx.bodies.chunk import axis_of, strides_of
from mst_fx.bodies.work import Work
from mst_fx.core.config import Accumulate
from mst_fx.placement.partition import Stages
from mst_fx.runtime.cache_version import VERSION
from mst_fx.runtime.loop_operator import LoopSpec
from mst_fx.runtime.mini_sequence import CallSpec


@dataclass(frozen=True, eq=False)
class Call:
    """What the graph holds in place of a region.

    Attributes:
        spec: the literals.
        forward: body of the loop that only computes results; None where the forward computes gradients, too.
        forward_tail: the same for the ragged last chunk, None where there is none.
        backward: body of the loop that computes gradients; None where there are none.
        backward_tail: the same for the ragged last chunk, None where there is none.
    """

    spec: CallSpec
    forward: Body | None = None
    forward_tail: Body | None = None
    backward: Body | None = None
    backward_tail: Body | None = None

    @property
    def bodies(self) -> tuple[Body | None, ...]:
        """The bodies in the order of the arguments of `mini_sequence`."""
        return (self.forward, self.forward_tail, self.backward, self.backward_tail)


def assembled(
    work: Work,
    chunk: int,
    forward_chunk: int,
    accumulate: Accumulate,
    known: dict[Hashable, Body] | None = None,
    tails: bool = True,
) -> Call:
    """Trace the bodies of one region and assemble its call.

    Args:
        work: the work of the region.
        chunk: positions of one chunk in the loop that computes gradients.
        forward_chunk: positions of one chunk in the loop that only computes results.
        accumulate: dtype policy for gradients of whole operands in half precision.
        known: bodies that have been traced for other calls, which this one shares; its own are added.
        tails: whether to trace the bodies of ragged last chunks: without, the call tells its memory, but cannot run.
    """
    stages, known = work.stages, {} if known is None else known

    def once(trace: Callable[..., Body], *what: Any, factored: bool = True) -> Body:
        key = (work, trace, *what, factored)
        if key not in known:
            known[key] = trace(stages, *what, factored=factored)
        return known[key]

    ins = tuple(axis_of(stages, node) for node in stages.operands)
    spec = CallSpec(work.backward, (), (), work.differentiable, work.wanted, work.reused)
    spec = spec._replace(projections=len(stages.projections), sums=len(stages.sums))
    call = Call(spec)
    in_forward = work.backward == "in_forward"
    if not in_forward:
        full, tail = _full_and_tail(stages, forward_chunk, partial(once, forward_body), tails)
        forward_spec = LoopSpec(VERSION, forward_chunk, ins, full.literals, strides_of(stages))
        spec = spec._replace(forward_spec=tuple(forward_spec))
        call = Call(spec, full, tail)
    if work.backward != "none":
        # the backward casts while it scales; where one chunk is all, or may be, nothing adds up in another dtype
        cast = not in_forward or stages.dynamic or stages.length <= chunk
        gradients = Gradients(work.wanted, work.differentiable, in_forward, accumulate, work.reused, cast)
        full, tail = _full_and_tail(stages, chunk, partial(once, gradient_body, gradients), tails)
        read = () if in_forward else (*work.differentiable, *work.reused)
        given = tuple(axis_of(stages, stages.ends[i]) for i in read)
        strides = tuple((len(given) + position, of_operand) for position, of_operand in strides_of(stages))
        spec = spec._replace(backward_spec=tuple(LoopSpec(VERSION, chunk, given + ins, full.literals, strides)))
        call = replace(call, spec=spec, backward=full, backward_tail=tail)
    return call


def _full_and_tail(stages: Stages, chunk: int, make: Callable[..., Body], tails: bool) -> tuple[Body, Body | None]:
    """Return the body of a full chunk, and that of the ragged last one: for any length if only run time knows it.

    A short body may end in other ops than a long one; products move out of both or none.
    """
    ragged = None if stages.dynamic else stages.length % chunk
    full, tail = make(chunk), make(ragged) if tails and ragged != 0 else None
    if tail is not None and tail.outs != full.outs:
        full, tail = make(chunk, factored=False), make(ragged, factored=False)
    if tail is not None and tail.outs != full.outs:
        raise AssertionError(f"the bodies of {chunk} and {ragged} positions differ: {full.outs}, {tail.outs}")
    return full, tail
