"""Who does the work in `peers.py`. Libraries that are not installed are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peers_work import Work
from torch.utils.checkpoint import checkpoint

Function = Callable[..., torch.Tensor]
REFERENCE = {"head": "torch.compile", "mlp": "torch.compile + checkpointing"}
"""The method that the ratios are to."""


def methods_of(work: Work, chunks: list[int]) -> dict[str, Function]:
    """The methods by name, the reference first.

    Args:
        work: what they do.
        chunks: lengths (tokens) of mini-sequences to try beside the plan's own.
    """
    fn = work.fn
    compiled = {"torch.compile": torch.compile(fn)}
    ours = {'mst_fx, `accumulate="native"`': looped(fn, accumulate="native"), "mst_fx": looped(fn)}
    for chunk in chunks:
        ours[f"mst_fx, native, chunks of {chunk:,}"] = looped(fn, accumulate="native", chunk_tokens=chunk)
        ours[f"mst_fx, chunks of {chunk:,}"] = looped(fn, chunk_tokens=chunk)
    if work.kind == "head":
        return {**compiled, **ours, "eager": fn, **head_peers(work)}
    checkpointed = {REFERENCE[work.kind]: torch.compile(with_checkpointing(fn))}
    return {**checkpointed, **ours, **compiled, "eager": fn, **mlp_peers(work)}


def looped(fn: Function, **options: Any) -> Function:
    return torch.compile(fn, backend="mst_fx", options={"strict": True, "min_bytes": 0, **options})


def with_checkpointing(fn: Function) -> Function:
    def checkpointed(*args: torch.Tensor) -> torch.Tensor:
        return checkpoint(fn, *args, use_reentrant=False)

    return checkpointed


def head_peers(work: Work) -> dict[str, Function]:
    options = {"auto_chunker.enable": True, "auto_chunker.amplify_ratio_threshold": 1, "auto_chunker.num_chunk": 8}
    peers: dict[str, Function] = {"Inductor's auto_chunker, 8 chunks": torch.compile(work.fn, options=options)}
    cap = work.soft_cap or None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(softcap=cap)
        peers["Liger fused linear cross-entropy"] = lambda x, w, y: liger(w, x, y)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        peers["cut-cross-entropy"] = lambda x, w, y: linear_cross_entropy(x, w, y, softcap=cap)
    except ImportError:
        pass
    own = getattr(F, "linear_cross_entropy", None)
    if own is not None and cap is None:
        peers["F.linear_cross_entropy"] = lambda x, w, y: own(x, w, y, options=torch.nn.LinearCrossEntropyOptions())
    return peers


def mlp_peers(work: Work) -> dict[str, Function]:
    """Tiled MLPs of other libraries: they take a module, and a function of it and of a part of the tokens."""

    def tiled(run: Callable[..., torch.Tensor]) -> Function:
        def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
            holder = torch.nn.Module()
            holder.weights = weights
            return run(lambda module, part: work.fn(part, *module.weights), holder, x, list(weights))

        return call

    peers: dict[str, Function] = {}
    try:
        from liger_kernel.ops.tiled_mlp import apply_tiled_mlp

        peers["Liger tiled MLP"] = tiled(lambda fn, module, x, weights: apply_tiled_mlp(fn, module, x, None, weights))
    except ImportError:
        pass
    try:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

        def deepspeed(fn: Callable[..., torch.Tensor], module: torch.nn.Module, x: torch.Tensor, weights: list) -> Any:
            shards = -(-x.shape[0] // x.shape[1])  # as its users count them: ceil(tokens / hidden)
            return TiledMLP.apply(fn, module, x[None], shards, weights)[0]  # it takes batches of sequences

        peers["DeepSpeed's TiledMLP"] = tiled(deepspeed)
    except ImportError:
        pass
    return peers
