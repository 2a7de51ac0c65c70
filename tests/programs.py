"""Random token-wise functions: every position of a batch of sequences is computed alone until the end.

Legend: B sequences, S tokens each, D features. A layout is how tokens lie in the value that a program works on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from looping import indices, values

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": F.relu}
WIDTHS = (2, 4, 6)
IGNORED = -100

# layout -> (tokens of one sequence lie together, all tokens are in one dim)
LAYOUTS = {"BSD": (True, False), "SBD": (False, False), "[BS]D": (True, True), "[SB]D": (False, True)}


class Program(NamedTuple):
    """What hypothesis draws and prints; `run` says what it means.

    Attributes:
        sizes: B, S, D of the stream.
        start: layout of the stream.
        steps: (name, arguments); a list among the arguments is the shape of a parameter.
        end: what becomes of the last value.
        ignored: which labels are ignored: "none", "some" or "first" (the first half of each sequence).
    """

    sizes: tuple[int, int, int]
    start: str
    steps: list[tuple]
    end: str
    ignored: str


def inputs_of(program: Program) -> list[torch.Tensor]:
    """Stream, labels, mask, parameters."""
    B, S, D = program.sizes
    shape = {"BSD": [B, S, D], "SBD": [S, B, D]}.get(program.start, [B * S, D])
    parameters = [argument for step in program.steps for argument in step[1:] if isinstance(argument, list)]
    labels = indices(B, S, below=WIDTHS[0])
    if program.ignored == "some":
        labels[indices(B, S, below=3, seed=1) == 0] = IGNORED
        labels[0, 0] = 1
    if program.ignored == "first":
        labels[:, : S // 2] = IGNORED
    mask = indices(B, S, below=3, seed=2) == 0
    floats = [values(*shape)] + [values(*shape, seed=i) * 0.7 for i, shape in enumerate(parameters, start=1)]
    stream, *rest = (x.requires_grad_() for x in floats)
    return [stream, labels, mask, *rest]


def arranged(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A value of [B, S, ..] in another layout."""
    by_sequence, merged = LAYOUTS[layout]
    x = x if by_sequence else x.transpose(0, 1)
    return x.reshape(-1, *x.shape[2:]) if merged else x


def run(program: Program, x: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, *parameters: torch.Tensor):
    B, S, _ = program.sizes
    layout, left = program.start, iter(parameters)
    for name, *arguments in program.steps:
        given = [next(left) if isinstance(argument, list) else argument for argument in arguments]
        if name == "layout":
            x, layout = moved(x, layout, given[0], (B, S)), given[0]
        elif name == "mask":
            x = x.masked_fill(arranged(mask, layout).unsqueeze(-1), given[0])
        else:
            x = STEPS[name](x, *given)
    return ENDS[program.end](x, arranged(labels, layout), arranged(mask, layout))


def moved(x: torch.Tensor, before: str, after: str, lengths: tuple[int, int]) -> torch.Tensor:
    """From one layout into another, with as few ops as possible."""
    (by_sequence, merged), (then_by_sequence, then_merged) = LAYOUTS[before], LAYOUTS[after]
    if merged:
        x = x.view(*(lengths if by_sequence else lengths[::-1]), x.shape[-1])
    x = x if by_sequence == then_by_sequence else x.transpose(0, 1)
    return x.reshape(-1, x.shape[-1]) if then_merged else x


def rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def gate(x, name):
    a, b = x.chunk(2, -1)
    return ACTIVATIONS[name](a) * b


def per_head(x, heads):
    return x.view(*x.shape[:-1], heads, -1).softmax(-1).flatten(-2) + x


def residual(x, weight):
    return x + torch.tanh(x @ weight)


STEPS = {
    "linear": F.linear,
    "activation": lambda x, name: ACTIVATIONS[name](x),
    "layer_norm": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
    "rms_norm": rms_norm,
    "softmax": lambda x: x.softmax(-1),
    "scale": lambda x, factor: x * factor,
    "gate": gate,
    "per_head": per_head,
    "residual": residual,
}


def cross_entropy(reduction, x, labels, mask):
    return F.cross_entropy(x.reshape(-1, x.shape[-1]), labels.reshape(-1), reduction=reduction, ignore_index=IGNORED)


def picked_mean(x, labels, mask):
    picked = x.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1))
    return -picked.squeeze(-1).masked_fill(labels == IGNORED, 0).mean()


def masked_mean(x, labels, mask):
    kept = (~mask).to(x.dtype)
    return (x.square().mean(-1) * kept).sum() / kept.sum().clamp(min=1)


ENDS = {
    "value": lambda x, labels, mask: x,
    "cross_entropy": lambda *given: cross_entropy("mean", *given),
    "cross_entropy_sum": lambda *given: cross_entropy("sum", *given),
    "cross_entropy_none": lambda *given: cross_entropy("none", *given),
    "picked_mean": picked_mean,
    "masked_mean": masked_mean,
    "mean": lambda x, labels, mask: x.square().mean(),
    "feature_sums": lambda x, labels, mask: x.reshape(-1, x.shape[-1]).sum(0).tanh(),
}


@st.composite
def programs(draw: st.DrawFn) -> Program:
    sizes = (draw(st.sampled_from([1, 3])), draw(st.integers(2, 6)), draw(st.sampled_from(WIDTHS)))
    start = draw(st.sampled_from(list(LAYOUTS)))
    width, steps = sizes[2], []
    for _ in range(draw(st.integers(1, 6))):
        step = draw(step_of(width))
        width = {"linear": lambda: step[1][0], "gate": lambda: width // 2}.get(step[0], lambda: width)()
        steps.append(step)
        if width == 1:  # too narrow for what comes next
            steps.append(("linear", [WIDTHS[0], 1]))
            width = WIDTHS[0]
    end, ignored = draw(st.sampled_from(list(ENDS))), draw(st.sampled_from(["none", "some", "first"]))
    return Program(sizes, start, steps, end, ignored)


def step_of(width: int) -> st.SearchStrategy[tuple]:
    """One step on values of this many features."""
    activation = st.sampled_from(list(ACTIVATIONS))
    linear = st.sampled_from(WIDTHS).flatmap(
        lambda out: st.sampled_from([("linear", [out, width]), ("linear", [out, width], [out])])
    )
    return st.one_of(
        linear,
        linear,  # twice: what the library is for
        st.tuples(st.just("activation"), activation),
        st.tuples(st.just("gate"), activation),
        st.tuples(st.just("layout"), st.sampled_from(list(LAYOUTS))),
        st.tuples(st.just("mask"), st.sampled_from([0.0, -1.0])),
        st.sampled_from(
            [
                ("layer_norm", [width], [width]),
                ("rms_norm", [width]),
                ("softmax",),
                ("scale", []),
                ("per_head", width // 2),
                ("residual", [width, width]),
            ]
        ),
    )


def describe(steps: Sequence[tuple]) -> str:
    return " ".join(step[0] for step in steps)
