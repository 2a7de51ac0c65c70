"""Inductor's lowering of the loop operator: each body becomes a function of the generated module, the loop one call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from mst_fx.core.sizes import is_symbolic
from mst_fx.core.torch_private.inductor_ir import (
    V,
    config,
    constrain_to_fake_tensor,
    convert_shape_to_inductor,
    hand_over,
    ir,
    is_spare,
    lowerings,
    register_lowering,
)
from mst_fx.core.torch_private.tracing import FakeTensorProp
from mst_fx.kernels.write_order import let_overwrite, written_after
from mst_fx.runtime.loop_operator import LoopSpec, chunk_examples, mini_sequence_loop
from mst_fx.runtime.overwriting import overwritable

# Inductor warns of every operator with subgraphs that it does not know; it then leaves the bodies as they are
warnings.filterwarnings("ignore", message="Please add support for subgraph args to function mini_sequence_loop")


class MiniSequenceKernel(ir.ExternKernel):
    """One loop in Inductor's graph; Inductor fuses nothing into it and moves nothing through it."""

    def __init__(
        self,
        subgraphs: Sequence[Any],
        spec: tuple[Any, ...],
        operands: Sequence[Any],
        layout: Any,
        pairs: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__(name=None, layout=layout, inputs=operands)
        self.outputs: list[Any] = []
        self.subgraphs, self.spec, self._pairs = subgraphs, spec, pairs
        self.name = V.graph.register_buffer(self)
        V.graph.register_operation(self)

    def get_subgraphs(self) -> list[Any]:
        """Return the bodies, so that Inductor sees what they use."""
        return [subgraph for subgraph in self.subgraphs if subgraph is not None]

    def should_allocate(self) -> bool:
        """Return False: the runtime allocates the results."""
        return False

    def has_side_effects(self) -> bool:
        """Return False: Inductor may remove a loop whose results nobody reads."""
        return False

    def codegen(self, wrapper: Any) -> None:
        """Write the bodies, each once, and the call of the loop."""
        names = []
        for subgraph in self.subgraphs:
            if subgraph is not None:
                with _settings(subgraph.graph.example_inputs):
                    wrapper.codegen_subgraph_common(subgraph)
            names.append(subgraph.graph.name if subgraph is not None else "None")
        buffers: Sequence[Any] = self.inputs
        operands = ", ".join(buffer.codegen_reference() for buffer in buffers)
        overwrites = next((pair for pair in self._pairs if self._reads_last(buffers[pair[1]], wrapper)), None)
        arguments = f"({', '.join(names)}), {self.spec!r}, [{operands}]"
        wrapper.add_import_once("from mst_fx.runtime.loop_operator import run_loop")
        if overwrites is None:
            wrapper.writeline(f"{self.get_name()} = run_loop({arguments})")
        else:
            wrapper.writeline(f"{self.get_name()} = run_loop({arguments}, {overwrites})")
            hand_over(buffers[overwrites[1]], wrapper)

    def _reads_last(self, operand: Any, wrapper: Any) -> bool:
        buffers: Sequence[Any] = self.inputs
        once = [buffer.get_name() for buffer in buffers].count(operand.get_name()) == 1
        return once and is_spare(self, operand, wrapper)


@register_lowering(mini_sequence_loop, type_promotion_kind=None)
def _lower(full: Any, tail: Any, spec: tuple[Any, ...], *operands: Any) -> list[Any]:
    node = V.graph.current_node
    operand_nodes: Any = node.args[3:]
    fakes = [operand.meta["val"] for operand in operand_nodes]
    with V.fake_mode:
        examples = chunk_examples(spec, fakes, V.fake_mode.shape_env)
    taken = [fake if axis else chunk for fake, axis, chunk in zip(fakes, spec[2], examples[0], strict=True)]
    realized = [
        constrain_to_fake_tensor(ir.ExternKernel.realize_input(operand), like)
        for operand, like in zip(operands, taken, strict=True)
    ]
    for subgraph, chunk in zip((full, tail), examples, strict=True):
        if subgraph is not None:
            _compile_body(subgraph, chunk)
    pairs = overwritable(LoopSpec(*spec).outs, spec[2], node.meta["val"], fakes)
    layout = ir.MultiOutputLayout(device=fakes[0].device)
    kernel = MiniSequenceKernel((full, tail), spec, realized, layout, list(pairs))
    kernel.outputs = [_output(kernel, value, position) for position, value in enumerate(node.meta["val"])]
    return [ir.TensorBox.create(output) for output in kernel.outputs]


def _compile_body(subgraph: Any, chunk: Sequence[torch.Tensor]) -> None:
    """Run Inductor over a body, for the operands of one chunk."""
    if subgraph.graph is not None:
        return
    FakeTensorProp(subgraph.graph_module, mode=V.fake_mode).propagate_dont_convert_inputs(*chunk)
    module = subgraph.graph_module if _any_length(chunk) else let_overwrite(subgraph.graph_module)
    subgraph.graph = V.graph.make_subgraph(gm=module, example_inputs=list(chunk), subgraph_name=subgraph.name)
    with V.set_graph_handler(subgraph.graph), _settings(chunk):
        subgraph.graph.run(*chunk)


def _any_length(chunk: Sequence[torch.Tensor]) -> bool:
    return any(is_symbolic(size) for x in chunk for size in x.shape)


def _settings(chunk: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
    """Forbid a body of any length kernels that reduce along both axes: torch 2.11 cannot split these without a hint.

    Such a kernel serves many rows; Inductor takes it unless it knows that the rows are few.
    """
    return config.patch({"triton.mix_order_reduction": False} if _any_length(chunk) else {})


@register_lowering(written_after, type_promotion_kind=None)
def _written_after(value: Any, previous: Any) -> Any:
    """Make the value depend on `previous` in name only: Inductor lets the last reader of a buffer overwrite it."""
    previous.realize()
    same = lowerings[torch.ops.aten.eq.Tensor](previous, previous)
    return lowerings[torch.ops.aten.where.self](same, value, value)


def _output(kernel: MiniSequenceKernel, value: torch.Tensor, position: int) -> Any:
    size, stride = map(convert_shape_to_inductor, (value.shape, value.stride()))
    layout = ir.FixedLayout(device=value.device, dtype=value.dtype, size=size, stride=stride)
    return ir.MultiOutput(layout, kernel, [(list, position)], skip_size_stride_alignment_checks=True)
