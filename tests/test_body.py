"""Random token-wise functions, looped with their gradients and compared with eager execution in float64."""

import pytest
import torch
from hypothesis import event, example, given, note, settings
from hypothesis import strategies as st
from looping import Call, aten_graph, as_list, differentiably_looped, placeholders
from programs import Program, inputs_of, programs, run

from mst_fx.lower import OPENINGS
from mst_fx.stages import cut

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def gradients(outputs, inputs):
    """Of all outputs at once, with an upstream gradient other than 1."""
    leaves = [x for x in inputs if x.requires_grad]
    upstream = [torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y) * 1.7 for y in outputs]
    return torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)


def check(function, inputs, chunk, in_forward=False, any_length=False):
    """The stages, after their loop has given what eager execution gives."""
    module = aten_graph(Call(function, inputs), OPENINGS)
    note(module.code) if in_hypothesis else None
    stages = cut(module, placeholders(module)[0])
    results = differentiably_looped(module, stages, inputs, min(chunk, stages.length), in_forward, any_length)
    expected = as_list(function(*inputs))
    torch.testing.assert_close(results, expected, **CLOSE)
    torch.testing.assert_close(gradients(results, inputs), gradients(expected, inputs), **CLOSE)
    return stages
