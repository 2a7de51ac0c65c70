"""Checks of a machine: versions, the backend's name, device, compilers and caches, and a loop that is compiled."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812

import mst_fx
from mst_fx.core.faults import missing_name, words_of
from mst_fx.core.readable import readable
from mst_fx.core.torch_private import inductor

PASS = ("mst_fx.engine", "mst_fx.runtime.dynamo_capture", "mst_fx.runtime.inductor_lowering")
"""The modules that need names of torch which a version may lack."""
SWITCHES = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
TOKENS, FEATURES, CHUNK = 64, 16, 16
TOLERANCE = 1e-4
"""The largest difference of a loss or a gradient in float32, of numbers around 1."""


@dataclass(frozen=True)
class Check:
    """What one check has found.

    Attributes:
        status: "ok", "note" for what is off but may be meant so, "FAIL" for what keeps the loops from running.
        text: what it has found, and what to do.
    """

    status: Literal["ok", "note", "FAIL"]
    text: str

    def __str__(self) -> str:
        return f"{self.status:<5} {self.text}"


def examined(inner: str = "inductor", device: str | None = None) -> Iterator[Check]:
    """Yield what each check finds, one after the other.

    Args:
        inner: the compiler of the loop that is tried, as the option `inner`.
        device: as torch names it; None for a GPU where there is one, else the CPU.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    yield Check("ok", f"Python {platform.python_version()}, torch {torch.__version__}")
    yield Check("ok", f"mst_fx {mst_fx.__version__} in {Path(mst_fx.__file__).parent}")
    yield _backend()
    yield _device(chosen)
    yield from map(_loads, PASS)
    yield from _settings(chosen, inner)
    yield _tried(inner, chosen)


def _backend() -> Check:
    try:
        found = "mst_fx" in torch.compiler.list_backends()
    except Exception as error:
        return Check("FAIL", f"torch.compile cannot list its backends: {words_of(error)}")
    if found:
        return Check("ok", 'torch.compile finds the backend "mst_fx"')
    text = 'torch.compile does not find the backend "mst_fx": install the package, or give backend=mst_fx.backend'
    return Check("FAIL", text)


def _device(name: str) -> Check:
    try:
        from mst_fx.predict.time import device_of

        memory = readable(device_of(torch.device(name)).memory)
        called = torch.cuda.get_device_name(name) if torch.device(name).type == "cuda" else platform.machine()
    except Exception as error:
        return Check("FAIL", f"device {name}: {words_of(error)}")
    return Check("ok", f"device {name}: {called}, {memory} of memory")


def _loads(module: str) -> Check:
    try:
        importlib.import_module(module)
    except Exception as error:
        name = missing_name(error)
        why = f"torch {torch.__version__} has no {name}" if name else words_of(error)
        return Check("FAIL", f"{module} cannot be loaded, so there are no loops: {why}")
    return Check("ok", f"{module} loads")


def _settings(device: str, inner: str) -> Iterator[Check]:
    """Yield what the process has switched off, and what Inductor lacks."""
    for name in SWITCHES:
        if os.environ.get(name, "0") not in ("", "0"):
            yield Check("FAIL", f"{name} is set: torch.compile compiles nothing")
    if inner != "inductor":
        yield Check("note", f"Inductor is not checked: the loop is tried with {inner}")
        return
    if inductor.option("cpp_wrapper"):
        yield Check("FAIL", "Inductor's C++ wrapper is on, and cannot call loops: set cpp_wrapper=False")
    missing = inductor.missing_compiler(torch.device(device).type)
    if missing:
        yield Check("FAIL", f"Inductor needs {missing} for {device}: install it, or use the option inner='aot_eager'")
    else:
        yield Check("ok", f"Inductor has a compiler for {device}")
    yield _caches()


def _caches() -> Check:
    folder = inductor.cache_folder()
    if folder is None:
        return Check("note", "this version of torch does not tell where its caches are")
    place = next((path for path in (Path(folder), *Path(folder).parents) if path.exists()), Path(folder))
    if not os.access(place, os.W_OK):
        return Check("note", f"the caches in {folder} cannot be written: each process compiles anew")
    return Check("ok", f"caches are in {folder}")


def _tried(inner: str, device: str) -> Check:
    """Compile an MLP and a head with loops, and compare loss and gradients with eager execution."""
    what = f"a loop compiled with {inner} on {device}"
    torch.compiler.reset()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tensors, labels = _sample(device)
        options: dict[str, Any] = {"min_bytes": 0, "chunk_tokens": CHUNK, "inner": inner}
        compiled = torch.compile(_step, backend=mst_fx.backend, options=options, dynamic=False)
        told = len(mst_fx.reports())
        given = _trained(compiled, tensors, labels)
        regions = [region for report in mst_fx.reports()[told:] for region in report.regions]
        expected = _trained(_step, tensors, labels)
    except Exception as error:
        return Check("FAIL", f"{what} fails: {words_of(error)}")
    if len(regions) != 2:
        return Check("FAIL", f"{what}: {len(regions)} of 2 regions are looped; mst_fx.reports() tells why")
    apart = max(float((a - b).abs().max()) for a, b in zip(given, expected, strict=True))
    if not apart <= TOLERANCE:
        return Check("FAIL", f"{what} differs from eager execution by {apart:.1e}; please report it")
    return Check("ok", f"{what} gives the loss and the gradients of eager execution, within {apart:.1e}")


def _sample(device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    shapes = ((1, TOKENS, FEATURES), (8 * FEATURES, FEATURES), (FEATURES, 8 * FEATURES), (16 * FEATURES, FEATURES))
    tensors = [torch.randn(shape, device=device).div_(FEATURES**0.5).requires_grad_() for shape in shapes]
    return tensors, torch.randint(16 * FEATURES, (TOKENS,), device=device)


def _step(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> Any:
    hidden = x + F.linear(F.silu(F.linear(x, up)), down)
    return F.cross_entropy(F.linear(hidden, head).flatten(0, 1), labels)


def _trained(step: Any, tensors: list[torch.Tensor], labels: torch.Tensor) -> list[torch.Tensor]:
    loss = step(*tensors, labels)
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]
