"""Values on the host: they leave the device beside the computation, and come back one block ahead of their use.

Terms
  sent      a value on the host
  handle    what stands for a sent value between forward and backward: a tensor of its shape with one element. As
            long as somebody holds it, the value stays; whoever frees a graph without a backward frees it, too
  stop      the values that one block reads: they come back together
  before    the stop that forward has sent before: backward wants it next

Copies of a device go over one stream, in order. So memory of the host can be used again while copies still run.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Iterator, Sequence
from threading import RLock
from typing import Any

import torch

from mst_fx.runtime.host_memory import Block, HostMemory

LOST = (
    "mst_fx: backward was given a copy of what stands for a value on the host. Hooks on saved tensors, such as "
    "save_on_cpu, make such copies: leave them out, or compile without the option offload"
)

ALIGNMENT = 64
"""Compiled code expects memory to begin at a multiple of so many bytes."""

CHANGED = "mst_fx: a value that backward needs has been modified by an in-place operation"


class Sent:
    """A value on the host.

    Attributes:
        stop: it, and what comes back with it.
        kept: the value itself where it is too small to be sent.
        times: how often it has come back.
    """

    def __init__(self, road: Road, stop: Stop, value: torch.Tensor, *, stays: bool) -> None:
        self._road, self.stop = road, stop
        self._size, self._dtype = value.shape, value.dtype
        self._ahead: tuple[torch.Tensor, Any, Any] | None = None
        self._left: Any = None
        self.kept = value if stays else None
        self._version = value._version
        self.times = 0
        self._block: Block | None = None
        if not stays:
            self._block = road.memory.take(value.numel() * value.element_size())
            self._left = road.copy(self._pairs(value, leaves=True))
        stop.values.append(weakref.ref(self))

    def _pairs(self, value: torch.Tensor, *, leaves: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what to copy where: pieces of the value's memory, and those of the host's."""
        assert self._block is not None
        there = value.view(-1).view(torch.uint8)
        for part in self._block.parts:
            piece, there = there[: part.numel()], there[part.numel() :]
            here = part[: piece.numel()]
            yield (here, piece) if leaves else (piece, here)

    def left(self) -> None:
        """Let what follows on the device wait until the value has left it."""
        self._road.wait(self._left)

    def ask(self) -> None:
        """Let the value come back to the device, if it is not on its way."""
        if self.kept is None and self._ahead is None:
            value = torch.empty(self._size, dtype=self._dtype, device=self._road.device)
            self._ahead = value, self._road.copy(self._pairs(value, leaves=False)), self._road.stream()

    def fetched(self) -> torch.Tensor:
        """Return the value in new memory of the device.

        Raises:
            RuntimeError: it stayed on the device, and somebody has written to it since.
        """
        self.times += 1
        if self.kept is not None:
            if self.kept._version != self._version:
                raise RuntimeError(CHANGED)
            return self.kept.clone()
        self.ask()
        assert self._ahead is not None
        (value, event, stream), self._ahead = self._ahead, None
        self._road.wait(event)
        if stream != self._road.stream():
            value.record_stream(self._road.stream())
        return value

    def __del__(self) -> None:
        """Give the host's memory back; the device's, which may still be written to, not before that is done."""
        if getattr(self, "_ahead", None) is not None:
            value, event, stream = self._ahead  # type: ignore[misc]
            if event is not None:
                stream.wait_event(event)
            del value
        if getattr(self, "_block", None) is not None:
            self._road.memory.give_back(self._block)  # type: ignore[arg-type]


class Stop:
    """The values that come back together."""

    def __init__(self, before: Stop | None) -> None:
        self.values: list[weakref.ref[Sent]] = []
        self._before = weakref.ref(before) if before is not None else lambda: None

    def ask(self, times: int) -> None:
        """Let the values come back that are still there, but for those that have come back more often than `times`."""
        for each in self.values:
            if (sent := each()) is not None and sent.times <= times:
                sent.ask()

    @property
    def before(self) -> Stop | None:
        """The stop before, if anything of it is still there."""
        return self._before()


class Road:
    """The way between one device and the host."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.memory = device, HostMemory(device)
        self._copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: weakref.ref[Stop] | None = None

    def stop(self, *, new: bool) -> Stop:
        """Return the stop that the next value belongs to."""
        last = self._last() if self._last is not None else None
        if last is None or new:
            last = Stop(last)
            self._last = weakref.ref(last)
        return last

    def stream(self) -> Any:
        """Return the stream that computes now; None on a CPU."""
        return torch.cuda.current_stream(self.device) if self._copies is not None else None

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """Copy beside the computation, behind what is computed so far; return the event of the end, None on a CPU.

        Args:
            pairs: targets and sources.
        """
        if self._copies is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._copies.wait_stream(self.stream())
        with torch.cuda.stream(self._copies):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def wait(self, event: Any) -> None:
        """Let what is computed from now on wait for a copy; the host does not wait."""
        if event is not None:
            self.stream().wait_event(event)


_roads: dict[torch.device, Road] = {}
_lock = RLock()


def road(device: torch.device) -> Road:
    """Return the way between a device and the host."""
    with _lock:
        if device not in _roads:
            _roads[device] = Road(device)
        return _roads[device]


def send(value: torch.Tensor, *, new: bool, least: int) -> torch.Tensor:
    """Send a value to the host, and return its handle; the value has to stay as it is until `left`.

    Args:
        value: contiguous, on the device.
        new: whether it is the first value of a stop.
        least: bytes; a smaller value stays on the device.

    Raises:
        HostMemoryError: the host has too little memory.
    """
    with _lock:
        way = road(value.device)
        stays = value.numel() * value.element_size() < least
        return handle(Sent(way, way.stop(new=new), value, stays=stays), value.shape)


def handle(sent: Sent, size: Sequence[int]) -> torch.Tensor:
    """Return another handle of a sent value."""
    memory = _Memory()
    memory.sent = sent
    start = -ctypes.addressof(memory) % ALIGNMENT
    one = torch.frombuffer(memory, dtype=torch.int8, offset=start, count=1)
    _held[one.data_ptr()] = memory
    return one.as_strided(size, [0] * len(size))


def sent_by(handle: torch.Tensor) -> Sent:
    """Return the value that a handle stands for.

    Raises:
        RuntimeError: it is a copy of a handle.
    """
    memory = _held.get(handle.untyped_storage().data_ptr())
    if memory is None:
        raise RuntimeError(LOST)
    return memory.sent


def come_back(handle: torch.Tensor, *, ahead: bool) -> torch.Tensor:
    """Return the value on the device.

    Args:
        handle: of the value.
        ahead: whether to let those of the block before come, too.

    Raises:
        RuntimeError: it is a copy of a handle.
    """
    with _lock:
        sent = sent_by(handle)
        sent.stop.ask(sent.times)
        if ahead and (before := sent.stop.before) is not None:
            before.ask(sent.times)
        return sent.fetched()


def ask_ahead(handle: torch.Tensor) -> None:
    """Let the values of the block before come to the device: behind a value that has come back.

    Raises:
        RuntimeError: it is a copy of a handle.
    """
    with _lock:
        sent = sent_by(handle)
        if (before := sent.stop.before) is not None:
            before.ask(sent.times - 1)


class _Memory(ctypes.c_int8 * (2 * ALIGNMENT)):  # type: ignore[misc]
    """The memory of a handle: whoever holds the handle holds it, and so what was sent."""

    sent: Sent


_held: weakref.WeakValueDictionary[int, _Memory] = weakref.WeakValueDictionary()


def host_bytes() -> int:
    """Return the bytes of the host's memory that values have taken; they are kept for later steps."""
    return sum(way.memory.taken for way in _roads.values())
