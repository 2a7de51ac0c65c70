"""Inductor's graph, its lowering and its wrapper code.

Private torch API: all names of this file. Run on torch 2.11, 2.13 and 2.15.
"""

from typing import Any

from torch._inductor import config as config
from torch._inductor import ir as ir
from torch._inductor.ir import convert_shape_to_inductor as convert_shape_to_inductor  # type: ignore[attr-defined]
from torch._inductor.lowering import constrain_to_fake_tensor as constrain_to_fake_tensor
from torch._inductor.lowering import lowerings as lowerings
from torch._inductor.lowering import register_lowering as register_lowering
from torch._inductor.virtualized import V as V


def is_spare(kernel: Any, operand: Any, wrapper: Any) -> bool:
    """Return whether a kernel may overwrite an operand: it is all of a buffer of this graph, which it reads last.

    Args:
        kernel: its code is being written.
        operand: one of its inputs.
        wrapper: the code of the graph.
    """
    name = operand.get_name()
    reader: Any = V.graph.scheduler.current_node
    buffer: Any = V.graph.try_get_buffer(name)
    if reader.node is not kernel or name not in reader.last_usage or not wrapper.can_reuse(buffer):
        return False
    layout, whole = operand.get_layout(), buffer.get_layout()
    is_all = layout.offset == 0 and V.graph.sizevars.statically_known_equals(operand.get_numel(), buffer.get_numel())
    owns = type(whole) is ir.FixedLayout and not buffer.get_inputs_that_alias_output()
    return is_all and owns and not _is_shown(name)


def _is_shown(name: str) -> bool:
    """Return whether another buffer of the graph lies in the memory of this one."""
    for buffer in V.graph.buffers:
        layout = buffer.get_output_spec()
        if name in (*buffer.get_inputs_that_alias_output(), *buffer.get_mutation_names()):
            return True
        if isinstance(layout, ir.NonOwningLayout) and layout.view.get_name() == name:
            return True
    return False


def hand_over(operand: Any, wrapper: Any) -> None:
    """Take an operand from Inductor: another value lies in its memory now, which no third one is to take.

    A donated input stays: Inductor gives its memory to nobody.
    """
    name = operand.get_name()
    if name not in V.graph.graph_inputs:
        wrapper.freed.add(name)
        wrapper.writeline(f"del {name}")
