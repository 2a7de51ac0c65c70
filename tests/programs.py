"""Random token-wise functions: every position of a batch of sequences is computed alone until the end.

Legend: B sequences, S tokens each, D features. A layout is how tokens lie in the value that a program works on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from looping import indices, values
from torch import nn

ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": nn.functional.relu,
}
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
    """Stream, labels, mask, parameters; the first three in the program's first layout."""
    B, S, D = program.sizes
    labels = indices(B, S, below=WIDTHS[0])
    if program.ignored == "some":
        labels[indices(B, S, below=3, seed=1) == 0] = IGNORED
        labels[0, 0] = 1  # a mean over no label at all is another matter
    if program.ignored == "first":
        labels[:, : S // 2] = IGNORED
    mask = indices(B, S, below=3, seed=2) == 0
    tokens = [moved(x, "BSD", program.start, (B, S)).contiguous() for x in (values(B, S, D), labels, mask)]
    shapes = [argument for step in program.steps for argument in step[1:] if isinstance(argument, list)]
    parameters = [values(*shape, seed=i) * 0.7 for i, shape in enumerate(shapes, start=1)]
    for x in (tokens[0], *parameters):
        x.requires_grad_()
    return [*tokens, *parameters]


def moved(x: torch.Tensor, before: str, after: str, lengths: tuple[int, int]) -> torch.Tensor:
    """A value of every token, from one layout into another."""
    if before == after:
        return x
    (by_sequence, merged), (then_by_sequence, then_merged) = LAYOUTS[before], LAYOUTS[after]
    if merged:
        x = x.view(*(lengths if by_sequence else lengths[::-1]), *x.shape[1:])
    x = x if by_sequence == then_by_sequence else x.transpose(0, 1)
    return x.reshape(-1, *x.shape[2:]) if then_merged else x


def run(program: Program, x: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, *parameters: torch.Tensor):
    layout, left = program.start, iter(parameters)

    def here(of_tokens: torch.Tensor) -> torch.Tensor:
        return moved(of_tokens, program.start, layout, program.sizes[:2])

    for name, *arguments in program.steps:
        given = [next(left) if isinstance(argument, list) else argument for argument in arguments]
        if name == "layout":
            x, layout = moved(x, layout, given[0], program.sizes[:2]), given[0]
        elif name == "mask":
            x = x.masked_fill(here(mask).unsqueeze(-1), given[0])
        else:
            x = STEPS[name](x, *given)
    return ENDS[program.end](x, here(labels), here(mask))


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
    "linear": nn.functional.linear,
    "activation": lambda x, name: ACTIVATIONS[name](x),
    "layer_norm": lambda x, weight, bias: nn.functional.layer_norm(x, weight.shape, weight, bias),
    "rms_norm": rms_norm,
    "softmax": lambda x: x.softmax(-1),
    "scale": lambda x, factor: x * factor,
    "gate": gate,
    "per_head": per_head,
    "residual": residual,
}


def cross_entropy(reduction, x, labels, mask):
    return nn.functional.cross_entropy(
        x.reshape(-1, x.shape[-1]), labels.reshape(-1), reduction=reduction, ignore_index=IGNORED
    )


def picked_mean(x, labels, mask):
    picked = x.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1))
    return -picked.squeeze(-1).masked_fill(labels == IGNORED, 0).mean()


def masked_mean(x, labels, mask):
    kept = (~mask).to(x.dtype)
    return (x.square().mean(-1) * kept).sum() / kept.sum().clamp(min=1)


ENDS = {
    "value": lambda x, labels, mask: x,
    "head": lambda *given: cross_entropy("mean", *given),
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
    for kind in [linear_of, *[step_of] * draw(st.integers(0, 5))]:
        steps.append(draw(kind(width)))
        width = width_after(steps[-1], width)
        if width % 2:  # a gate needs halves
            steps.append(("linear", [WIDTHS[0], width]))
            width = WIDTHS[0]
    end, ignored = draw(st.sampled_from(list(ENDS))), draw(st.sampled_from(["none", "some", "first"]))
    return Program(sizes, start, steps, end, ignored)


def width_after(step: tuple, width: int) -> int:
    if step[0] == "gate":
        return width // 2
    return step[1][0] if step[0] == "linear" else width


def linear_of(width: int) -> st.SearchStrategy[tuple]:
    """Without or with a bias."""
    return st.sampled_from(WIDTHS).flatmap(
        lambda out: st.sampled_from([("linear", [out, width]), ("linear", [out, width], [out])])
    )


def step_of(width: int) -> st.SearchStrategy[tuple]:
    """One step on values of this many features."""
    activation = st.sampled_from(list(ACTIVATIONS))
    return st.one_of(
        linear_of(width),
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
