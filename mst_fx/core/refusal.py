"""A refusal tells why the pass leaves a part of a graph as it was.

`Refusal` is the only exception that the stages of the pass raise on purpose, and the only one that they catch.
"""

from __future__ import annotations

from enum import Enum

from torch.fx import Node


class Reason(Enum):
    """Every reason for a refusal; the value is the advice that the report gives."""

    ESCAPES = "Keep the value inside the region: do not return it or use it elsewhere."
    NO_HEAD = "Compile the head and the loss in one function, so that one graph holds both."
    NO_LOSS = "Compute the loss inside the compiled function; logits that are returned must exist."
    OTHER_GRAPH = "Compute it and what reads it in one graph: the value that is handed on must exist."
    DDP = (
        "Checkpoint the layers: no checkpointed block is divided. Or set torch._dynamo.config.optimize_ddp = False: "
        "gradients are then reduced when the backward of a compiled graph is over, and not during it."
    )
    RANDOM = "Draw the numbers outside the region; dropout, bernoulli with a probability and rand_like may stay inside."
    MUTATION = "Use the out-of-place form of the op, or write to a copy: the region reads or makes this memory."
    UNKNOWN_OP = "Write the step with ops that have a placement rule, or give the op one: mst_fx.register_rule."
    AXIS_MIXED = "Let tokens meet before the values get wide, or after they are small again: not in between."
    TWO_PASSES = "Reduce over tokens last: a later step here needs both the sum and every token."
    GRAD_MODE = "Enter and leave no_grad or autocast outside the region."
    NOT_CONVEX = "Let no value leave the region and come back into it."
    UNREAD = "Remove it, or use its result: compilers leave out what nobody reads."
    SHAPE = "Use lengths above 1; a region of one row has nothing to split."
    TRANSFORM = "Leave wide values out of vmap, grad and jvp: give the batch a dim of its own, differentiate outside."
    SUBGRAPH = "Write its ops into the function around it, without the subgraph."
    NO_VALUE = "Compile with torch._dynamo.config.use_graph_deduplication = False."
    DYNAMIC = "Compile with static shapes (dynamic=False) or make only the split dim dynamic."
    DATA_DEPENDENT = (
        "Keep all tokens and mask what they give, as ignore_index does, in place of x[mask]. Route tokens to experts "
        "without sizes that depend on them: sort them, count them by histc or one_hot, and multiply group by group."
    )
    COMPLEX = "Compute with real and imaginary parts as tensors of their own."
    NUMBER = "Give the op a tensor, or a number that depends neither on the data nor on the length."
    SHARDED = "Ops on DTensors are looped where each rank computes on its own shard: redistribute before them."
    SUBCLASS = "Ops on tensor subclasses are looped where these are frozen weights alone, and on plain tensors."
    TAKEN = "Compute what both regions need once for each of them, so that each has its own."
    NO_PATTERN = "Write it so that no op makes the large value, or add a pattern (passes/README.md)."
    NO_GAIN = "No loop over tokens helps here. Checkpointing saves fewer of such values."
    NO_CHECKPOINT = "Checkpoint the layers inside the compiled function: what their checkpoints keep goes to the host."
    SMALL = "Set min_bytes, or chunk_tokens where one chunk holds all of it, or name the module in `modules`."
    BUDGET = "Allow more memory, or take what the text names."
    DIFFERS = "This is a bug in mst_fx; please report it with the text and this code. verify=True shows it again."
    BACKEND = "Use the Python wrapper of Inductor (cpp_wrapper=False)."
    TORCH = "Use a torch version that mst_fx was run on, or report the name that this one lacks."
    INTERNAL = "This is a bug in mst_fx; please report it with the traceback."


class Refusal(Exception):  # noqa: N818 - a decision, not an error
    """The region at `node` stays unrewritten.

    Args:
        reason: one of `Reason`.
        node: the node of the captured graph that is the obstacle; its source line goes into the report.
        text: one sentence that names the op or the value.
        advice: what to change, where it is not what the reason says.
    """

    def __init__(self, reason: Reason, node: Node | None, text: str, advice: str = "") -> None:
        super().__init__(text)
        self.reason = reason
        self.node = node
        self.text = text
        self.advice = advice or reason.value
