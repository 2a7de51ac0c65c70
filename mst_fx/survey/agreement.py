"""Ranks that meet in a loop have to run the same chunks: what they choose these by has to be the same on each."""

from __future__ import annotations

from torch.fx import Node

from mst_fx.bodies.work import Work
from mst_fx.core.config import Config, Wish
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.torch_private.collectives import is_collective
from mst_fx.ops.shards import OnDTensors
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.region import Region

ADVICE = "Say on every rank how long mini-sequences are (chunk_tokens, num_chunks) and that it is looped (min_bytes=0)."
OVER_HEADS = "Say on every rank in how many groups of heads attention runs (head_groups)."


def forbid_disagreement(reader: Reader, region: Region, work: Work, wish: Wish, config: Config) -> None:
    """Raise a refusal for a region whose ranks may choose different chunks, and meet in them.

    Shards of DTensors are of the same sizes on all ranks, and so are plans. The sizes of a program that communicates by
    itself may differ: there the user has to decide.
    """
    if not work.communicates or (wish.fixes_length and (wish.loop or config.min_bytes == 0)):
        return
    for node in region.nodes:
        if _meets_ranks(reader, node):
            text = f"{op_name(node)} communicates with other ranks, whose sizes may be others"
            raise Refusal(Reason.SHARDED, node, text, ADVICE if region.over == "tokens" else OVER_HEADS)


def _meets_ranks(reader: Reader, node: Node) -> bool:
    """Return whether a node communicates, and is no op on DTensors."""
    decomposed = reader.decomposed(node)
    if decomposed is None or isinstance(node.target, OnDTensors):
        return False
    return any(is_collective(op.target) for op in (*decomposed.ops, *decomposed.backward))
