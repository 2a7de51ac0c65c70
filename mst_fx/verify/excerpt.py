"""Region -> the same region alone in a graph, at sizes that are small enough to run it once.

A small region runs at its own sizes, with its own stages. A larger one runs at other sizes. Where the length is only
known at run time, that is a short length; otherwise each size is replaced by a smaller one, the same wherever it
occurs, and the nodes are analysed anew. Such an excerpt stands for the region only where the stages of both are alike,
op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log2, prod
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from mst_fx.bodies.work import Work, analysed
from mst_fx.capture.fixed_sizes import known_of
from mst_fx.capture.lower import under
from mst_fx.capture.run_node import execute
from mst_fx.core.config import Config
from mst_fx.core.graph_modules import module_over
from mst_fx.core.refusal import Refusal
from mst_fx.core.sizes import expression, hint, in_terms_of, seen
from mst_fx.core.torch_private.tracing import FakeTensorMode
from mst_fx.core.values import fake_value
from mst_fx.placement.placement import Split
from mst_fx.recognise.region import Region, needs_gradient

LIMIT = 16 * 2**20
"""The values of an excerpt may take this many bytes in float64."""
POSITIONS = 33
"""Length of a short axis: two chunks and a ragged one."""
NARROW, WIDE = 16, 256
"""Sizes from WIDE on get smaller where a region is too large; the smallest of them becomes about NARROW."""


@dataclass(frozen=True)
class Excerpt:
    """A region that can run.

    Attributes:
        region: the region, alone in its owner, whose placeholders are its live-ins.
        work: the work of its loop.
        length: length of the axis in positions.
        sizes: the sizes of the run, in words.
        measure: gives the number that stands for a size in the run.
    """

    region: Region
    work: Work
    length: int
    sizes: str
    measure: Callable[[Any], int]


def excerpt(region: Region, work: Work, config: Config) -> Excerpt | str:
    """Return the region at its own sizes, or at smaller ones; or a text that tells why it cannot run.

    Args:
        region: the region to loop.
        work: the work of its loop.
        config: options of the compile.
    """
    length = hint(work.stages.length)
    if _bytes(region, hint) <= LIMIT:
        return Excerpt(alone(region), work, length, "its own sizes", hint)
    if work.stages.dynamic:
        measure = _measured_at(work, POSITIONS)
        if _bytes(region, measure) <= LIMIT:
            short = measure(work.stages.length)
            return Excerpt(alone(region), work, short, f"{short} of its positions", measure)
    return _renamed(region, work, config)


def _bytes(region: Region, measure: Callable[[Any], int]) -> int:
    values = (fake_value(node) for node in (*region.live_ins, *region.nodes))
    return 8 * sum(prod(map(measure, value.shape)) for value in values if isinstance(value, torch.Tensor))


def _measured_at(work: Work, positions: int) -> Callable[[Any], int]:
    """Return a function like `hint`, with this value for the symbols of the length."""
    length: Any = work.stages.length
    values = known_of(work.sizes, {symbol: positions for symbol in expression(length).free_symbols})

    def measure(size: Any) -> int:
        known = isinstance(size, torch.SymInt) and values.keys() >= expression(size).free_symbols
        return int(in_terms_of(size, values)) if known else hint(size)

    return measure


Change: TypeAlias = Callable[[Node, Node, Mapping[Node, Any]], Any]


def alone(region: Region, change: Change | None = None) -> Region:
    """Copy the region into a graph of its own.

    Args:
        region: the region; it stays as it is.
        change: may change a copy, and returns its example value; it takes the original, the copy, and the values of the
            copies so far. Without it the values are the original's.
    """
    graph = Graph()
    node_of: dict[Node, Node] = {}
    known: dict[Node, Any] = {}
    for node in (*region.live_ins, *region.nodes):
        inside = node in region.modes
        copy = graph.node_copy(node, node_of.__getitem__) if inside else graph.placeholder(node.name)
        node_of[node], copy.meta = copy, dict(node.meta)
        if change is not None:
            known[copy] = copy.meta["example_value"] = change(node, copy, known)
    graph.output(tuple(_read(graph, region, node, node_of[node]) for node in region.outputs))
    module = module_over(region.owner, graph)  # it takes over the subgraphs that nodes of the graph read
    mapped = replace(
        region,
        owner=module,
        nodes=tuple(node_of[node] for node in region.nodes),
        outputs=tuple(node_of[node] for node in region.outputs),
        live_ins=tuple(node_of[node] for node in region.live_ins),
        stream=node_of[region.stream],
        before=node_of[region.last],
        moved_ahead=(),
        modes={node_of[node]: mode for node, mode in region.modes.items()},
        returned=tuple(node_of[node] for node in region.returned if node in node_of),
        smaller=None,
        front=frozenset(node_of[node] for node in region.front if node in node_of),
        products=tuple(node_of[node] for node in region.products),
    )
    module.recompile()
    return mapped


def _read(graph: Graph, region: Region, node: Node, copy: Node) -> Node:
    """Add the reader of an output, for the graph to return: with a gradient or without, as in the original."""
    needs = needs_gradient(node, set(region.nodes))
    if needs and any(user.op == "output" for user in node.users):
        return copy
    reader = graph.call_method("clone" if needs else "detach", (copy,))
    value = fake_value(copy)
    reader.meta = {"example_value": value if needs else value.detach()}
    return reader


def _renamed(region: Region, work: Work, config: Config) -> Excerpt | str:
    """Return the region at smaller sizes, analysed anew; or a text that tells why there is none."""
    length = hint(work.stages.length)
    names = _names(region, work, length)
    if not names:
        return "it is too large to run, and its sizes cannot be told apart"
    fakes = FakeTensorMode()
    rename = partial(_rename, names, length)

    def change(original: Node, copy: Node, known: Mapping[Node, Any]) -> Any:
        if copy.op == "placeholder":
            return _fake(fakes, fake_value(original), rename)
        copy.args, copy.kwargs = (map_aggregate(given, rename) for given in (copy.args, copy.kwargs))  # type: ignore[assignment]
        mode = region.modes[original]
        with fakes, under(mode.autocast), torch.set_grad_enabled(mode.grad):
            return execute(region.owner, copy, known)

    try:
        other = alone(region, change)
        found = analysed(other, config, {})
    except Refusal as refusal:
        return f"it is too large to run, and refused at smaller sizes: {refusal.text}"
    except Exception as error:
        return f"it is too large to run, and does not run at smaller sizes: {first_line(error)}"
    if _bytes(other, hint) > LIMIT:
        return "it is too large to run, even at smaller sizes"
    if _stages_of(found) != _stages_of(work):
        return "it is too large to run, and its stages differ at smaller sizes"
    told = ", ".join(f"{size} -> {name}" for size, name in sorted(names.items()))
    return Excerpt(other, found, hint(found.stages.length), f"smaller sizes ({told})", hint)


def _names(region: Region, work: Work, length: int) -> dict[int, int]:
    """Return a new size for the length, and for each wide size of a matrix; none where one size means two things."""
    placeholders = (node for node in work.stages.graph.nodes if node.op == "placeholder")
    factors, widths, counts = {1}, set[int](), set[int]()
    for placeholder, live_in in zip(placeholders, region.live_ins, strict=True):
        value, placement = fake_value(live_in), work.stages.placements.of.get(placeholder)
        if not isinstance(value, torch.Tensor):
            continue
        if isinstance(placement, Split):
            factors.add(placement.outer * placement.inner)
        else:
            sizes = [hint(size) for size in value.shape]
            widths.update(size for size in sizes[-2:] if size >= WIDE)
            counts.update(sizes[:-2])  # number of experts: keys and the bounds of a histogram depend on it
    divisor = 2 ** int(log2(min(widths, default=NARROW) / NARROW))
    names = {size: size // divisor for size in widths}
    others = [hint(size) for size in fake_value(region.stream).shape[:-1]]
    short = max(POSITIONS, *(2 * size + 1 for size in others if size % length or size < length), 0)
    for factor in factors:
        short = names.get(factor * length, factor * short) // factor
    agree = all(names.get(factor * length, factor * short) == factor * short for factor in factors)
    return {**names, length: short} if agree and short > 2 and not widths & counts else {}


def _rename(names: Mapping[int, int], length: int, given: Any) -> Any:
    """Return the new size for a size or a multiple of the length; return all else as it is."""
    if type(given) is not int or given <= 0:
        return given
    if given in names or given % length:
        return names.get(given, given)
    return _rename(names, length, given // length) * names[length]


def _fake(fakes: FakeTensorMode, value: Any, rename: Callable[[int], int]) -> Any:
    """Return a live-in with other sizes, whose dims have the same order in memory."""
    if isinstance(value, torch.SymFloat):
        return seen(value)
    if not isinstance(value, torch.Tensor):
        return rename(hint(value)) if isinstance(value, int | torch.SymInt) else value
    shape = [rename(hint(size)) for size in value.shape]
    with fakes:
        fake = dense_like_strides([hint(stride) for stride in value.stride()], shape, value.dtype, value.device)
    return fake.requires_grad_(value.requires_grad)


def dense_like_strides(
    strides: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Allocate a dense tensor whose dims have the order of these strides in memory."""
    dims = sorted(range(len(shape)), key=lambda dim: (-strides[dim], dim))
    dense = torch.empty([shape[dim] for dim in dims], dtype=dtype, device=device)
    return dense.permute([dims.index(dim) for dim in range(len(shape))])


def _stages_of(work: Work) -> tuple[Any, ...]:
    """Return a key that is equal for two regions whose stages and gradients are alike."""
    stages = work.stages
    targets = [[node.target for node in stage] for stage in (stages.prologue, stages.loop, stages.epilogue)]
    return (stages.axis, targets, work.backward, work.wanted, work.differentiable, work.reused)


def first_line(error: BaseException) -> str:
    """Return the type of an error, and the first line of its message (160 characters)."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
