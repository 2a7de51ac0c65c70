"""The ops of graphs whose values go to the host: opaque to compilers, which see tensors of the value's shape.

Forward:   handle = to_host(x, ...)          x starts to leave the device
           saved = on_host(handle, x, y)     behind y, x has left: its memory can be used again
Backward:  x = to_device(saved, g, ...)      behind g, x is there again, and what the block before keeps is on its way
           ask_ahead(h, saved)               if not, it is from here on, behind h
"""

from __future__ import annotations

import torch

from mst_fx.runtime import transfers


@torch.library.custom_op("mst_fx::to_host", mutates_args=())
def to_host(x: torch.Tensor, order: list[int], new: bool, least: int) -> torch.Tensor:
    """Send a value to the host; return its handle.

    Args:
        x: dense, in any order of its dims.
        order: its dims as they lie in memory.
        new: whether it is the first value that a block keeps.
        least: bytes; a smaller value stays on the device.
    """
    return transfers.send(x.permute(order).contiguous(), new=new, least=least)


@to_host.register_fake
def _(x: torch.Tensor, order: list[int], new: bool, least: int) -> torch.Tensor:
    return _handle([x.shape[dim] for dim in order])


@torch.library.custom_op("mst_fx::on_host", mutates_args=())
def on_host(handle: torch.Tensor, x: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """Wait on the device until a value has left it; return another handle.

    Args:
        handle: of the value.
        x: the value, which is not freed or overwritten before.
        behind: is computed before.
    """
    sent = transfers.sent_by(handle)
    sent.left()
    return transfers.handle(sent, handle.shape)


@on_host.register_fake
def _(handle: torch.Tensor, x: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    return _handle(handle.shape)


@torch.library.custom_op("mst_fx::to_device", mutates_args=())
def to_device(
    handle: torch.Tensor,
    behind: torch.Tensor | None,
    order: list[int],
    dtype: torch.dtype,
    device: torch.device,
    ahead: bool,
) -> torch.Tensor:
    """Return a value that was sent to the host, in new memory.

    Args:
        handle: of the value.
        behind: is computed before; None where nothing is.
        order: its dims as they lie in memory.
        dtype: of the value.
        device: of the value.
        ahead: whether to ask for what the block before keeps.
    """
    return transfers.come_back(handle, ahead=ahead).permute(_inverse(order))


@to_device.register_fake
def _(
    handle: torch.Tensor,
    behind: torch.Tensor | None,
    order: list[int],
    dtype: torch.dtype,
    device: torch.device,
    ahead: bool,
) -> torch.Tensor:
    return torch.empty(handle.shape, dtype=dtype, device=device).permute(_inverse(order))


@torch.library.custom_op("mst_fx::ask_ahead", mutates_args=("handle",))
def ask_ahead(behind: torch.Tensor, handle: torch.Tensor) -> None:
    """Let what the block before keeps come to the device.

    Args:
        behind: is computed before.
        handle: of a value that came back for this block. Nothing writes to it; it is declared so that no compiler
            drops the op.
    """
    transfers.ask_ahead(handle)


@ask_ahead.register_fake
def _(behind: torch.Tensor, handle: torch.Tensor) -> None:
    return None


def _handle(size: list[int] | torch.Size) -> torch.Tensor:
    return torch.empty_strided(size, [0] * len(size), dtype=torch.int8, device="cpu")


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
