"""Region -> what a loop over it has to do, whatever the length of a chunk. Regions that are alike share it."""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from mst_fx.bodies.attention import kept_results, part_biases, with_projections, with_results_kept, with_sums
from mst_fx.bodies.connected import connected
from mst_fx.capture.fingerprint import likeness_of_nodes
from mst_fx.capture.fixed_sizes import as_if_fixed, equal, fix_all, forbid_lengths, other_dims, to_be_fixed
from mst_fx.capture.lower import apart, lower
from mst_fx.capture.scalar_operands import as_tensors
from mst_fx.core.config import Config
from mst_fx.core.graph_walk import descendants
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.torch_private.captured import graph_break
from mst_fx.core.torch_private.collectives import is_collective
from mst_fx.core.values import fake_value
from mst_fx.placement.partition import Numbers, Stages, partition
from mst_fx.placement.placement import PARTIAL
from mst_fx.placement.propagate import Unequal
from mst_fx.placement.rules import scales_with_upstream
from mst_fx.placement.rules.counting import DISTINCT
from mst_fx.recognise.region import Region, needs_gradient
from mst_fx.recognise.sorted_rows import is_picked_by_top_k

Backward = Literal["recompute", "in_forward", "none"]


@dataclass(frozen=True, eq=False)
class Work:
    """The stages of a region, and its gradients.

    Attributes:
        stages: the partitioned aten graph.
        backward: how gradients are made.
        wanted: positions of the loop's leaves that get a gradient.
        differentiable: positions of the loop's ends that have one.
        reused: positions of the loop's results that the backward reads and does not recompute.
        fixed: positions of the region's live-ins that are numbers, and whose values the stages depend on.
        sizes: sizes of its tensors that the stages take as fixed, or as equal.
    """

    stages: Stages
    backward: Backward
    wanted: tuple[int, ...]
    differentiable: tuple[int, ...]
    reused: tuple[int, ...]
    fixed: tuple[int, ...] = ()
    sizes: tuple[Any, ...] = ()

    @property
    def differentiated(self) -> tuple[Node, ...]:
        """The leaves of the loop that get a gradient."""
        return tuple(self.stages.leaves[position] for position in self.wanted)

    @property
    def communicates(self) -> bool:
        """Whether each chunk meets the same chunk of other ranks."""
        return any(is_collective(node.target) for node in (*self.stages.loop, *self.stages.backward))


def analysed(
    region: Region,
    config: Config,
    known: dict[Hashable, Work],
    marked: Container[str] = (),
    sizes: tuple[Any, ...] = (),
    *,
    again: bool = False,
) -> Work:
    """Lower and partition a region, and decide how its gradients are made.

    Args:
        region: the region.
        config: its `returned_logits` decides which results carry gradients.
        known: the work of earlier regions, which one that is alike shares; this work is added.
        marked: names of the sizes that have to vary.
        sizes: sizes that are fixed in the region's graph.
        again: whether a checkpoint around the region asks for nothing to be saved: the backward recomputes then.

    Raises:
        Refusal: the region must not be looped.
    """
    key = (_likeness(region), tuple(map(str, sizes)), again)
    if key not in known:
        try:
            work = _with_sizes_fixed(region, config, sizes, marked)
            known[key] = _recomputing(region, work) if again and work.backward == "in_forward" else work
        except Refusal as refusal:
            raise _at_the_user(region, refusal) from None
    return known[key]


def _recomputing(region: Region, work: Work) -> Work:
    return replace(work, backward="recompute", reused=_reused(region, work.stages, work.differentiable))


def _with_sizes_fixed(region: Region, config: Config, sizes: tuple[Any, ...], marked: Container[str]) -> Work:
    """Return the work, with the sizes fixed that stand in its way; this ends, as each round fixes one more."""
    stream = fake_value(region.stream)
    sizes += other_dims(stream, marked)
    while True:
        try:
            return _analysed(region, config, sizes, marked)
        except Numbers as numbers:
            node, number = numbers.read[0]
            more = to_be_fixed(numbers.read, stream, marked)
            refusal = Refusal(Reason.NUMBER, node, f"{node.target} takes {number}, which cannot be fixed")
        except Unequal as unequal:
            more = equal(unequal.size, unequal.needed, marked)
            refusal = Refusal(Reason.DYNAMIC, unequal.node, f"{unequal}, which may vary")
        if {*map(str, more)} <= {*map(str, sizes)}:
            raise refusal
        sizes += more


def _at_the_user(region: Region, refusal: Refusal) -> Refusal:
    """Return the refusal with a live-in's name in the captured graph, and the first node that reads it."""
    node = refusal.node
    if node is None or node.op != "placeholder" or node in region.live_ins:
        return refusal
    placeholders = [other for other in node.graph.nodes if other.op == "placeholder"]
    live_in = region.live_ins[placeholders.index(node)]
    reader = next((user for user in region.nodes if live_in in user.all_input_nodes), live_in)
    return Refusal(refusal.reason, reader, refusal.text.replace(node.name, live_in.name))


def fix_for(region: Region, work: Work) -> None:
    """Guard on what the work takes as fixed, for this region: other values compile anew."""
    fix_all((*work.sizes, *(fake_value(region.live_ins[position]) for position in work.fixed)))


def _likeness(region: Region) -> Hashable:
    inside = set(region.nodes)
    ends = tuple(
        (region.nodes.index(node), needs_gradient(node, inside), *_returned(region, node)) for node in region.outputs
    )
    modes = tuple(region.modes[node] for node in region.nodes)
    likeness = likeness_of_nodes(region.nodes, region.live_ins)
    distinct = tuple(map(is_picked_by_top_k, region.live_ins))
    return (likeness, region.live_ins.index(region.stream), ends, modes, distinct)


def _returned(region: Region, output: Node) -> tuple[bool, bool]:
    """Return whether an output is a large value that the graph returns, and whether it stays as it is.

    The code behind a graph break may write to it, as eager execution allows.
    """
    stays = any(user.op == "output" for user in output.users) and not graph_break(region.owner)
    return output in region.returned, stays


def _analysed(region: Region, config: Config, sizes: tuple[Any, ...], marked: Container[str]) -> Work:
    examples = apart(as_if_fixed([fake_value(node) for node in region.live_ins], sizes))
    lowered = lower(region.owner, region.nodes, region.live_ins, region.outputs, region.modes, examples=examples)
    stream = region.live_ins.index(region.stream)
    fixed = as_tensors(lowered, region.live_ins, partial(forbid_lengths, stream=examples[stream], marked=marked))
    placeholders = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    for placeholder, live_in in zip(placeholders, region.live_ins, strict=True):
        placeholder.meta[DISTINCT] = is_picked_by_top_k(live_in)
    if region.over == "heads":
        part_biases(lowered.graph)
    stages = partition(lowered, placeholders[stream], tokens_whole=region.over == "heads")
    needs_grad = _needs_grad(stages, dict(zip(placeholders, region.live_ins, strict=True)))
    _forbid_complex(region, needs_grad)
    if region.over == "heads":
        stages = with_results_kept(with_sums(with_projections(stages, needs_grad)), needs_grad)
    wanted = tuple(i for i, node in enumerate(stages.leaves) if needs_grad[node])
    wanted, differentiable = _gradients(region, stages, wanted, config)
    backward = _backward(stages, differentiable)
    reused = _reused(region, stages, differentiable) if backward == "recompute" else ()
    return Work(stages, backward, wanted, differentiable, reused, fixed, sizes)


def _needs_grad(stages: Stages, live_in_of: dict[Node, Node]) -> dict[Node, bool]:
    """Return which values need a gradient: real or complex ones that depend on a live-in that needs one."""
    needs: dict[Node, bool] = {}
    for node in stages.graph.nodes:
        made = tree_leaves(node.meta.get("val"))
        floating = any(isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()) for x in made)
        if node.target == torch.ops.aten.detach.default:
            needs[node] = False
        elif node in live_in_of:
            needs[node] = floating and bool(fake_value(live_in_of[node]).requires_grad)
        else:
            needs[node] = floating and any(needs[operand] for operand in node.all_input_nodes)
    return needs


def _forbid_complex(region: Region, needs_grad: Mapping[Node, bool]) -> None:
    """Raise a refusal for gradients of complex numbers, and for views that conjugate or negate what they read."""
    for live_in in region.live_ins:
        value = fake_value(live_in)
        if isinstance(value, torch.Tensor) and (value.is_conj() or value.is_neg()):
            raise Refusal(Reason.COMPLEX, live_in, f"{op_name(live_in)} gives a view of complex numbers")
    if any(needs_gradient(node, set(region.nodes)) for node in region.outputs):
        for node, needs in needs_grad.items():
            if needs and any(isinstance(x, torch.Tensor) and x.is_complex() for x in tree_leaves(node.meta["val"])):
                raise Refusal(Reason.COMPLEX, node, f"{node.name} is complex and needs a gradient")


def _reused(region: Region, stages: Stages, differentiable: tuple[int, ...]) -> tuple[int, ...]:
    """Return the positions of the results that backward reads.

    They are those that attention's backward takes, and those that are returned as they are: they exist anyway.

    One that no other gradient passes is not read: it is not saved, and its reader may write to it.
    """
    exist = [all(_returned(region, outer)) for outer in region.outputs]
    returned = {inner for inner, exists in zip(stages.outputs, exist, strict=True) if exists}
    ends = {stages.ends[i] for i in differentiable}
    found = (i for i in differentiable if stages.ends[i] in returned)
    passed = {i for i in found if not ends.isdisjoint(descendants([stages.results[i]]) - {stages.results[i]})}
    kept = {node for each in kept_results(stages).values() for node in (each.result, each.logsumexp)}
    return tuple(i for i, node in enumerate(stages.results) if i in passed or node in kept)


def _gradients(
    region: Region, stages: Stages, wanted: tuple[int, ...], config: Config
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return positions of the loop's leaves that get a gradient, and of its ends that one can come back from."""
    inside = set(region.nodes)
    detached = region.returned if config.returned_logits == "detach" else ()
    outputs = zip(region.outputs, stages.outputs, strict=True)
    ends = [inner for outer, inner in outputs if needs_gradient(outer, inside) and outer not in detached]
    reached = stages.results_behind(ends)
    return connected(stages, wanted, reached) if reached and wanted else ((), ())


def _backward(stages: Stages, differentiable: tuple[int, ...]) -> Backward:
    """Return how gradients are made: in the forward if the region gives one scalar that costs matrix products.

    float16 recomputes: it needs the upstream scale when the gradients are made. So does a function whose gradients are
    no multiple of the one that comes back: one that clips it.
    """
    if not differentiable:
        return "none"
    sink = stages.ends[differentiable[0]]
    scalar = len(differentiable) == 1 and stages.placements.of[sink] == PARTIAL and sink.meta["val"].numel() == 1
    half = any(node.meta["val"].dtype == torch.float16 for node in (*stages.loop, *stages.operands) if _is_tensor(node))
    scales = scales_with_upstream(stages.loop, stages.backward)
    return "in_forward" if scalar and scales and stages.products and not half else "recompute"


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
