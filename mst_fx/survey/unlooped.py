"""The largest values of a graph and its subgraphs that no loop covers: those that a compiler writes to memory."""

from __future__ import annotations

import operator
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from mst_fx.capture.run_node import is_custom_function
from mst_fx.core.module_paths import module_path
from mst_fx.core.provenance import op_name, source_line
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import hint
from mst_fx.core.torch_private.captured import unwrapped
from mst_fx.core.values import bytes_of, plain_tensors, tensors_of
from mst_fx.plan.decisions import Plan
from mst_fx.predict.saved_activations import is_written, saved_values
from mst_fx.recognise.fragments import comes_from_another
from mst_fx.recognise.reader import Reader
from mst_fx.report.unlooped import Unlooped, kind_of, largest
from mst_fx.survey.surveyed import Site, Surveyed
from mst_fx.survey.why_unlooped import why_entering, why_unlooped


@dataclass(frozen=True)
class _Value:
    """A large value.

    Attributes:
        reader: of its graph.
        node: makes it.
        saved: whether it is saved for backward outside of any checkpointed block.
        times: how often its graph runs.
        known: why no loop covers it, where a plan or a match tells.
        within: the op that runs its graph, where no region looks into that; else "".
    """

    reader: Reader
    node: Node
    saved: bool = False
    times: int = 1
    known: Refusal | None = None
    within: str = ""


def unlooped(surveyed: Surveyed, plans: Mapping[Site, Plan], peak: int, least: int) -> tuple[Unlooped, ...]:
    """Return the largest values that no loop covers, those that are alike together, the largest first.

    Args:
        surveyed: the captured graph.
        plans: the decision for each region.
        peak: predicted peak bytes of a training step.
        least: smaller values do not count.
    """
    kinds: dict[Unlooped, _Value] = {}
    entries = []
    for value in (*_entering(surveyed.reader, least), *_values(surveyed, plans, least, 1)):
        entry = _entry(value)
        kinds.setdefault(kind_of(entry), value)
        entries.append(entry)
    return tuple(_explained(entry, kinds[kind_of(entry)]) for entry in largest(entries, peak))


def _values(surveyed: Surveyed, plans: Mapping[Site, Plan], least: int, times: int) -> Iterator[_Value]:
    """Yield the large values of a graph and of its subgraphs that are written to memory."""
    reader = surveyed.reader
    looped = {node: 0 for site in surveyed.sites if plans[site].lengths for node in site.region.nodes}
    left = {node: plans[site] for site in surveyed.sites if not plans[site].lengths for node in site.region.nodes}
    callers = {caller for _, callers in surveyed.children.values() for caller in callers}
    given = {item for caller in callers for item in caller.users if item.target is operator.getitem}
    large = [node for node in _large(reader.owner, least) if node not in {*looped, *callers, *given}]
    saved = saved_values(reader, looped, callers, hint) if large else {}
    for node in large:
        if is_written(reader, node, saved, {*looped, *callers}):
            yield _Value(
                reader, node, node in saved and not surveyed.around.repeated, times, _known(reader, left, node)
            )
    for child, its_callers in surveyed.children.values():
        yield from _values(child, plans, least, times * len(its_callers))
    yield from _unseen(reader, surveyed.children, looped, left, least, times)


def _known(reader: Reader, left: Mapping[Node, Plan], node: Node) -> Refusal | None:
    """Return why a plan or a match has left out what a node makes, None where neither tells."""
    return _left_by_plan(node, left[node]) if node in left else reader.unmatched.about(node)


def _unseen(
    reader: Reader,
    entered: Collection[str],
    looped: Container[Node],
    left: Mapping[Node, Plan],
    least: int,
    times: int,
) -> Iterator[_Value]:
    """Yield the large values of the other subgraphs, without their outputs: these are the op's.

    A region looks into a custom function with the op: what a loop covers is left out, and the rest has the op's reason.
    """
    for node in reader.owner.graph.find_nodes(op="get_attr"):
        child = getattr(reader.owner, str(node.target), None)
        if not isinstance(child, GraphModule) or node.target in entered:
            continue
        caller = next((user for user in node.users if user not in looped), None)
        if caller is None:
            continue
        known = _known(reader, left, caller)
        if known is None and is_custom_function(caller):
            known = why_unlooped(reader, caller)
        inner = Reader(child, {}, reader.modes[node], replace(reader.borders, within=op_name(caller)))
        outputs = child.graph.output_node().all_input_nodes
        for value in _large(child, least):
            if value not in outputs and is_written(inner, value, (), ()):
                yield _Value(inner, value, times=times, known=known, within=op_name(caller))
        yield from _unseen(inner, (), (), {}, least, times)


def _large(owner: GraphModule, least: int) -> list[Node]:
    """Return the calls of a graph that make new memory of at least `least` bytes."""
    calls = (node for node in owner.graph.nodes if node.op.startswith("call_"))
    return [node for node in calls if _bytes(node) >= max(least, 1) and not _shows_operands(node)]


def _bytes(node: Node) -> int:
    return sum(bytes_of(unwrapped(x)) for x in tensors_of(node))


def _shows_operands(node: Node) -> bool:
    """Return whether the value lies in the memory of operands; inside a transform, too."""
    own = _memory(node)
    return bool(own) and own <= set().union(*map(_memory, node.all_input_nodes))


def _memory(node: Node) -> set[torch.UntypedStorage]:
    tensors = [plain for x in tensors_of(node) for plain in plain_tensors(unwrapped(x))]
    return {x.untyped_storage() for x in tensors if x.layout == torch.strided}


def _entering(reader: Reader, least: int) -> Iterator[_Value]:
    """Yield the large inputs that other graphs have made: they have a gradient, and are no leaves of autograd.

    What comes from another fragment of the graph is told where that makes it.
    """
    inputs = reader.owner.graph.find_nodes(op="placeholder")
    for node in [node for node in inputs if not comes_from_another(reader, [node])]:
        made = [x for x in tensors_of(node) if x.requires_grad and not x.is_leaf]
        if made and node.users and _bytes(node) >= max(least, 1):
            yield _Value(reader, node, saved=False, known=why_entering(reader, node))


def _left_by_plan(node: Node, plan: Plan) -> Refusal:
    return Refusal(Reason.SMALL, node, f"left by the plan: {plan.reason}", plan.advice)


def _entry(value: _Value) -> Unlooped:
    """Return the entry of a value, with the reason only if it is known."""
    node, known = value.node, value.known
    enters = node.op == "placeholder"
    tensor = unwrapped(max(tensors_of(node), key=torch.Tensor.numel))
    told = (known.reason.name, known.text, known.advice) if known is not None else ("", "", "")
    return Unlooped(
        op_name(node),
        module_path(node),
        source_line(next(iter(node.users)) if enters else node),
        tuple(map(hint, tensor.shape)),
        str(tensor.dtype).removeprefix("torch."),
        _bytes(node),
        value.times,
        value.saved,
        *told,
        enters=enters,
    )


def _explained(entry: Unlooped, value: _Value) -> Unlooped:
    """Return an entry with its reason."""
    if value.known is not None:
        return entry
    why = why_unlooped(value.reader, value.node, value.within)
    return replace(entry, reason=why.reason.name, why=why.text, advice=why.advice)
