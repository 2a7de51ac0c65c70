"""Captured graphs, the rewrite without a compiler behind it, and graphs as text for goldens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node, symbolic_trace

import mst_fx
from mst_fx.capture.lower import execute
from mst_fx.pipeline import rewrite
from mst_fx.recognise.pattern import patterns
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region, close
from mst_fx.runtime.cache_version import VERSION
from mst_fx.runtime.mini_sequence import CallSpec, mini_sequence


def captured(fn: Callable[..., Any], *inputs: Any) -> GraphModule:
    """The graph that Dynamo hands to a backend."""
    seen: list[GraphModule] = []
    torch._dynamo.reset()
    torch.compile(fn, backend=lambda gm, _: seen.append(gm) or gm, fullgraph=True)(*inputs)
    return seen[0]


def sketched(fn: Callable[..., Any], *inputs: Any) -> GraphModule:
    """Such a graph without Dynamo, in a hundredth of the time: calls alone, no blocks and no writes to items."""
    gm = symbolic_trace(fn)
    fakes, given, env = FakeTensorMode(), iter(inputs), dict[Node, Any]()
    with fakes:
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                value = next(given)
                env[node] = fakes.from_tensor(value) if isinstance(value, torch.Tensor) else value
            elif node.op == "get_attr":
                env[node] = fakes.from_tensor(gm.get_parameter(str(node.target)))
            elif node.op != "output":
                env[node] = execute(gm, node, env)
            node.meta["example_value"] = env.get(node)
    return gm


def region_of(gm: GraphModule, returned: int = 0) -> Region:
    """All that a graph computes as one region; its first input that is a tensor holds the tokens.

    The first `returned` of its outputs are large values that the caller of the graph gets.
    """
    values = [node for node in gm.graph.nodes if isinstance(node.meta.get("example_value"), torch.Tensor | tuple)]
    calls = [node for node in values if node.op.startswith("call")]
    (stream, *_) = values
    return close(Reader(gm), calls, stream, tuple(gm.graph.output_node().all_input_nodes[:returned]))


def rewritten(gm: GraphModule, **options: Any) -> tuple[GraphModule, mst_fx.Report]:
    """The graph with loops of 4 tokens, and the report."""
    config = mst_fx.Config(**{"min_bytes": 0, "chunk_tokens": 4, **options})
    return rewrite(gm, config, patterns(config.disable))


def text(gm: GraphModule) -> str:
    """One line a node."""
    return "\n".join(_line(node) for node in gm.graph.nodes) + "\n"


def _line(node: Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return f"{node.op} {node.name}"
    if node.op == "output":
        return f"return {_show(node.args[0])}"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    arguments = [_show(arg) for arg in node.args] + [f"{key}={_show(value)}" for key, value in node.kwargs.items()]
    if node.target is mini_sequence:
        fields = CallSpec(*node.args[4])
        spec = [f"\n    {_show(field)}" for field in (fields if fields.saves_results else fields[:-1])]
        arguments = ["\n    " + ", ".join(arguments[:4]), *spec, "\n    " + ", ".join(arguments[5:])]
        return f"{node.name} = {name}({','.join(arguments)})"
    return f"{node.name} = {'.' if node.op == 'call_method' else ''}{name}({', '.join(arguments)})"


def _show(arg: Any) -> str:
    if isinstance(arg, (tuple, list)):
        return "(" + ", ".join(_show(item) for item in arg if item != VERSION) + ")"
    return str(arg)


def refusal_of(fn: Callable[..., Any], *inputs: Any, **options: Any) -> mst_fx.report.report.RefusedRegion:
    """The one refusal of a graph, which must have stayed as it was."""
    gm = captured(fn, *inputs)
    before = text(gm)
    after, report = rewritten(gm, **options)
    assert after is gm
    assert text(gm) == before
    assert not report.regions
    (refusal,) = report.refusals
    return refusal


def assert_untouched(fn: Callable[..., Any], *inputs: Any) -> None:
    """No pattern has anything to say."""
    gm = captured(fn, *inputs)
    after, report = rewritten(gm)
    assert after is gm
    assert not report.regions
    assert not report.refusals


def assert_idempotent(fn: Callable[..., Any], *inputs: Any) -> None:
    """A graph with loops has nothing more to loop."""
    looped, _ = rewritten(captured(fn, *inputs))
    again, report = rewritten(looped)
    assert again is looped
    assert not report.regions


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Random leaves that need a gradient."""
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]
