"""Functions on several ranks: processes of this machine with gloo, and a limit of time."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(world: int, function: Callable[..., Any], *args: Any, limit: float = 240) -> Any:
    """What a function returns on rank 0; it runs in `world` processes, which may import it by its name.

    Raises:
        RuntimeError: a rank raised an error, or is not done after `limit` seconds; all are killed then.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        given = (world, str(Path(folder, "store")), results, function, args)
        ranks = [context.Process(target=_rank, args=(rank, *given), daemon=True) for rank in range(world)]
        for rank in ranks:
            rank.start()
        told, end = dict[int, tuple[bool, Any]](), time.monotonic() + limit
        try:
            while len(told) < world and all(good for good, _ in told.values()):
                if time.monotonic() > end:
                    raise RuntimeError(f"only ranks {sorted(told)} of {world} were done after {limit} seconds")
                if not results.empty():
                    rank, good, value = results.get()
                    told[rank] = (good, value)
                elif any(rank.exitcode for rank in ranks):
                    raise RuntimeError(f"ranks ended with {[rank.exitcode for rank in ranks]}")
                else:
                    time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.join(0 if len(told) < world else 10)
                if rank.is_alive():
                    rank.kill()
                    rank.join()
    for rank, (good, value) in told.items():
        if not good:
            raise RuntimeError(f"rank {rank}:\n{value}")
    return told[0][1]


def _rank(rank: int, world: int, store: str, results: Any, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
        value = function(*args)
        dist.barrier()
        results.put((rank, True, value if rank == 0 else None))
        results.close()
        results.join_thread()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        results.close()
        results.join_thread()
        raise SystemExit(0) from None
