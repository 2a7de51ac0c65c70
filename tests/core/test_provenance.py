"""Where a node comes from: the line of the user, the op as a user writes it."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured
from torch import nn
from torch.fx import Graph

from mst_fx.core.provenance import op_name, source_line

HERE = str(Path(__file__))


def known(**meta):
    node = Graph().placeholder("x")
    node.meta.update(meta)
    return node


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 8)}), nn.Sequential(nn.GELU(), Doubled())])

    def forward(self, x):
        wide = self.blocks[0]["up"](x).relu()
        return self.blocks[1](wide) + 1


@pytest.fixture(scope="module")
def nodes():
    gm = captured(Model(), torch.randn(3, 4))
    return [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]


def test_lines_of_the_user(nodes):
    lines = [source_line(node) for node in nodes]
    assert all(line.startswith(f"{HERE}:") for line in lines)
    assert [line.split(": ", 1)[1] for line in lines] == [
        *['wide = self.blocks[0]["up"](x).relu()'] * 2,
        "return self.blocks[1](wide) + 1",
        "return x * 2",
        "return self.blocks[1](wide) + 1",
    ]
    written = Path(__file__).read_text().splitlines()
    for line in lines:
        number, code = line.removeprefix(f"{HERE}:").split(": ", 1)
        assert written[int(number) - 1].strip() == code


def test_frames_of_torch_are_left_out():
    torch_file = f"{torch.__path__[0]}/nn/modules/linear.py"
    mine, other = (
        '  File "/home/me/my model.py", line 7, in forward\n    y = up(x)\n',
        '  File "b.py", line 9, in f\n  g()',
    )
    inside = f'  File "{torch_file}", line 134, in forward\n    return F.linear(input)\n'
    beside = f'  File "{torch.__path__[0]}tune/norms.py", line 5, in forward\n    return rms(x)\n'
    assert source_line(known(stack_trace=mine + beside + inside)).endswith("torchtune/norms.py:5: return rms(x)")
    assert source_line(known(stack_trace=mine + inside)) == "/home/me/my model.py:7: y = up(x)"
    assert source_line(known(stack_trace=mine + inside + other)) == "b.py:9: g()"
    beside = f'  File "{torch.__path__[0]}ao/linear.py", line 3, in forward\n    return product(x)\n'
    assert source_line(known(stack_trace=mine + beside + inside)).endswith("ao/linear.py:3: return product(x)")
    assert [source_line(known(**meta)) for meta in ({"stack_trace": inside}, {"stack_trace": None}, {})] == ["", "", ""]


def test_ops_as_a_user_writes_them():
    graph = Graph()
    x = graph.placeholder("x")
    made = {
        "torch.nn.functional.gelu": graph.call_function(F.gelu, (x,)),
        "torch.nn.functional.linear": graph.call_function(F.linear, (x, x)),
        "torch.nn.functional.silu": graph.call_function(F.silu, (x,)),
        "torch.matmul": graph.call_function(torch.matmul, (x, x)),
        "operator.add": graph.call_function(operator.add, (x, 1)),
        "aten.mm.default": graph.call_function(torch.ops.aten.mm.default, (x, x)),
        "Tensor.view": graph.call_method("view", (x, -1)),
        "call_module up": graph.create_node("call_module", "up", (x,)),
        "placeholder x": x,
    }
    assert {name: op_name(node) for name, node in made.items()} == {name: name for name in made}


@torch.compiler.allow_in_graph
class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def test_a_custom_function_that_dynamo_leaves_as_a_call():
    graph = captured(Halved.apply, torch.randn(2, requires_grad=True)).graph
    assert f"{Halved.__module__}.Halved.apply" in [op_name(node) for node in graph.nodes]
