"""Memory of the host that values go to: pinned where a GPU copies, of exactly the size, used again from step to step.

torch's own allocator of pinned memory rounds up to powers of two: 3 GiB would take 4. Here memory is mapped in pages,
and pinned in place. Only where the system does not pin it, torch's allocator gives it, in parts that are powers of two.
It is kept until the process ends or larger values come.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import RLock

import torch

from mst_fx.core.readable import readable

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory.stat")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.stat"),
    ),
)
"""Limit, usage and the parts of the usage, of the two versions of control groups."""
LEAST_PART = 2**20
"""Bytes of the smallest part that torch's allocator is asked for."""
SHARE = 0.9
"""The share of the host's free memory that values may take: the rest is for the program."""

PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
ADVICE = [getattr(mmap, name) for name in ("MADV_HUGEPAGE", "MADV_DONTFORK") if hasattr(mmap, name)]
"""Of pinned pages: large ones are pinned sooner, and a forked process must not make copies of them on writing."""


class HostMemoryError(RuntimeError):
    """The host has too little memory for what a step sends there."""


class Block:
    """A piece of host memory.

    Attributes:
        size: number of bytes asked for.
        parts: tensors of bytes that make it up, in order: one, or several where only torch's allocator can pin memory.
    """

    def __init__(self, size: int, *, pinned: bool) -> None:
        self.size = size
        pages = mmap.mmap(-1, max(size, 1), **PRIVATE)
        self.parts = [torch.frombuffer(pages, dtype=torch.uint8)]
        self._registered = pinned and size > 0 and _registered(pages, self.parts[0].data_ptr(), size)
        if pinned and size > 0 and not self._registered:
            self.parts = list(_pinned_by_torch(size))

    def free(self) -> None:
        """Give the memory back to the system; nobody may use it any more."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self.parts[0].data_ptr())
            self._registered = False
        self.parts = []


def _registered(pages: mmap.mmap, address: int, size: int) -> bool:
    """Pin mapped pages in place; return whether the system lets us."""
    for advice in ADVICE:
        with suppress(OSError):
            pages.madvise(advice)
    if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0:
        return True
    with suppress(RuntimeError):  # CUDA tells the error once more, at the next call
        torch.zeros(1, device="cuda").item()
    return False


def _pinned_by_torch(size: int) -> Iterator[torch.Tensor]:
    """Yield memory of a size in powers of two, the largest first, of which torch's allocator rounds up none."""
    left = -(-size // LEAST_PART) * LEAST_PART
    while left:
        part = 1 << (left.bit_length() - 1)
        yield torch.empty(part, dtype=torch.uint8, pin_memory=True)
        left -= part


class HostMemory:
    """The blocks that values of one device go to."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock = device, RLock()
        self._free: list[Block] = []
        self._returned: deque[Block] = deque()  # a finalizer may run anywhere: it only appends, which takes no lock
        self.taken = 0

    def take(self, size: int) -> Block:
        """Return a block of at least a size: the smallest free one, or a new one in place of those too small.

        Raises:
            HostMemoryError: the host has too little memory.
        """
        with self._lock:
            self._collect()
            fitting = [block for block in self._free if block.size >= size]
            if fitting:
                block = min(fitting, key=lambda each: each.size)
                self._free.remove(block)
                return block
            self._release()
            check_room(size, self.taken)
            block = Block(size, pinned=self._device.type == "cuda")
            self.taken += size
            return block

    def give_back(self, block: Block) -> None:
        """Let a block be used again; copies that still run are in front of those that use it next."""
        self._returned.append(block)

    def _collect(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())

    def _release(self) -> None:
        """Free the blocks that nobody uses: all are smaller than what is asked for."""
        if self._free and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies from and to them may still run
        for block in self._free:
            self.taken -= block.size
            block.free()
        self._free.clear()


def check_room(size: int, taken: int = 0) -> None:
    """Check that the host has memory for so many bytes more.

    Args:
        size: bytes that are wanted.
        taken: bytes that values on the host take already.

    Raises:
        HostMemoryError: it has not.
    """
    free = available()
    if free is not None and size > SHARE * free:
        already = f", besides {readable(taken)} that are there already" if taken else ""
        raise HostMemoryError(
            f"mst_fx: offload needs {readable(size)} of host memory{already}; {readable(free)} are free. Offload fewer "
            "blocks (offload='auto' with memory_budget), use shorter sequences, or give the process more host memory"
        )


def available() -> int | None:
    """Return the bytes that the host, and the control group of the process, have free; None where nobody tells."""
    found = [*_free_of_the_host(), *_free_of_the_group()]
    return min(found, default=None)


def _free_of_the_host() -> Iterator[int]:
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _free_of_the_group() -> Iterator[int]:
    for limit, usage, stat in CONTROL_GROUPS:
        if limit.exists() and usage.exists() and (text := limit.read_text().strip()).isdigit():
            yield int(text) - int(usage.read_text()) + _cached_files(stat)


def _cached_files(stat: Path) -> int:
    """Return the bytes of files that the system drops when memory is wanted."""
    lines = (line.split() for line in stat.read_text().splitlines()) if stat.exists() else ()
    return sum(int(line[1]) for line in lines if line[0] == "inactive_file")
