"""Where AOTAutograd divides a joint graph into forward and backward, and the marks of checkpoints on its nodes.

Private torch API: all of torch's names in this file. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch._functorch.partitioners import min_cut_rematerialization_partition as min_cut
from torch._inductor.custom_graph_pass import CustomPartitionerFn as CustomPartitionerFn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

Partition: TypeAlias = Callable[..., tuple[GraphModule, GraphModule]]

default_partition: Partition = min_cut
"""What Inductor, and the backend aot_eager, divide graphs with."""


def recomputed_with(node: Node) -> int | None:
    """Return the number of the checkpoint that runs a node again in backward, None for other nodes."""
    recomputes = node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
    return node.meta.get("ac_graph_id", 0) if recomputes else None


def checkpoint_of(node: Node) -> int | None:
    """Return the number of the checkpoint that a node is in, None outside of any."""
    number: int | None = node.meta.get("ac_graph_id")
    return number


def aot_eager(gm: GraphModule, inputs: Any, partition: Partition) -> Callable[..., Any]:
    """Compile a graph as the backend aot_eager does, with another partitioner."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    compiled: Any = aot_autograd(
        fw_compiler=boxed_nop, bw_compiler=boxed_nop, partition_fn=partition, keep_inference_input_mutations=True
    )(gm, inputs)
    return compiled
