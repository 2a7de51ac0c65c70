"""The backend takes these options in torch.compile's `options=`, besides Inductor's own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from typing import Any, Literal, get_args

from mst_fx.core.module_paths import matches
from mst_fx.core.option_errors import no_options, unknown, wrong

Accumulate = Literal["float32", "native"]
ReturnedLogits = Literal["keep", "detach", "drop"]
Offload = Literal["checkpoints", "auto"]
Inner = Literal["inductor", "aot_eager", "eager"]


@dataclasses.dataclass(frozen=True)
class Wish:
    """What the user wants for one region.

    Attributes:
        loop: True or False where the user decides, None where the planner does.
        chunk_tokens, num_chunks: as in `Config`; over heads, `num_chunks` is `head_groups`.
    """

    loop: bool | None = None
    chunk_tokens: int | None = None
    num_chunks: int | None = None

    @property
    def fixes_length(self) -> bool:
        """Whether the user fixes the length of a chunk, so that the planner cannot choose it."""
        return self.chunk_tokens is not None or self.num_chunks is not None


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of `mst_fx.backend`.

    Attributes:
        memory_budget: what a training step of the compiled function may take on its device (inputs, parameters and
            gradients included): a number of bytes, "40GiB", "80GB", or a fraction of the device as a float. The
            planner chooses the cheapest loops that fit. None: it loops what costs no time, and what is a real share of
            the peak.
        min_bytes: a region whose temporaries are smaller (bytes, over the whole sequence) is left alone, and a larger
            one is looped, whatever its share of the peak; 0 loops all. None: 64 MiB, and the planner decides.
        chunk_tokens: tokens in one chunk, which is one mini-sequence; None lets the planner choose.
        num_chunks: number of chunks, in place of `chunk_tokens`; at most one of the two may be set.
        head_groups: number of groups of heads that attention runs in, 1 for all heads at once; None lets the planner
            choose. It takes the most groups that divide the heads of the keys evenly, and are no more than this number.
        modules: for regions with a node in a module with one of these paths ("model.layers.0.mlp", "*.mlp"; the longest
            match counts; see `module_paths`): False for no loop, True for a loop in any case, or {"chunk_tokens": n} or
            {"num_chunks": n}.
        accumulate: dtype in which the gradients of half-precision weights add up over the chunks:
            "float32" (as accurate as no loop; 4 bytes an element while the loop runs) or "native" (the weight's).
        returned_logits: what happens to logits that the compiled function also returns: "keep" their gradient (backward
            then starts from a gradient as large as the logits, zeros if nobody used them), "detach" them, or "drop"
            them: where a loss that is made of them needs a gradient, they are not returned, for callers that read only
            the loss; in their place is an object that says why when it is used (see `not_returned`).
        offload: what goes to the host's memory between forward and backward: "checkpoints" for what checkpointed blocks
            keep, "auto" for as many blocks of these as `memory_budget` asks for, None for nothing.
        disable: names of patterns to leave out.
        inner: the compiler of the rewritten graph: "inductor", "aot_eager", "eager" or a backend callable.
        mode: torch.compile's mode for the inner compiler; torch.compile takes no `mode=` beside `options=`.
        strict: raise errors of the pass, in place of compiling the graph unrewritten.
        verify: run each distinct region once while compiling, looped and as captured, on random numbers; a region whose
            loop differs by more than rounding is left alone.
        debug_dir: a folder, made where it is missing: for each compile the graph before and after, and the report.
    """

    memory_budget: int | float | str | None = None
    min_bytes: int | None = None
    chunk_tokens: int | None = None
    num_chunks: int | None = None
    head_groups: int | None = None
    modules: Mapping[str, bool | Mapping[str, int]] = dataclasses.field(default_factory=dict)
    accumulate: Accumulate = "float32"
    returned_logits: ReturnedLogits = "keep"
    offload: Offload | None = None
    disable: tuple[str, ...] = ()
    inner: Inner | Callable[..., Any] = "inductor"
    mode: str | None = None
    strict: bool = False
    verify: bool = False
    debug_dir: str | PathLike[str] | None = dataclasses.field(default=None, repr=False)  # repr: in keys of caches

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for a value that its option does not take."""
        least = self.min_bytes
        _check(least is None or (_is_int(least) and least >= 0), "min_bytes", "an int of bytes >= 0 or None", least)
        _check(_is_budget(self.memory_budget), "memory_budget", BUDGETS, self.memory_budget)
        for name in NUMBERS:
            value = getattr(self, name)
            _check(value is None or (_is_int(value) and value > 0), name, "a positive int or None", value)
        _check(isinstance(self.modules, Mapping), "modules", WISHES, self.modules)
        for path, said in self.modules.items():
            _check(_is_wish(path, said), "modules", WISHES, {path: said})
        if self.chunk_tokens is not None and self.num_chunks is not None:
            raise ValueError("mst_fx: chunk_tokens and num_chunks exclude each other")
        for name, texts in (("accumulate", get_args(Accumulate)), ("returned_logits", get_args(ReturnedLogits))):
            value = getattr(self, name)
            _check(value in texts, name, f"one of {texts}", value, texts)
        known_sets = self.offload is None or self.offload in get_args(Offload)
        _check(known_sets, "offload", f"None or one of {get_args(Offload)}", self.offload, get_args(Offload))
        if self.offload == "auto" and self.memory_budget is None:
            raise ValueError("mst_fx: offload='auto' needs a memory_budget, which says how many blocks to offload")
        _check(isinstance(self.disable, tuple), "disable", "a tuple or list of pattern names", self.disable)
        known = callable(self.inner) or self.inner in get_args(Inner)
        _check(known, "inner", f"a callable or one of {get_args(Inner)}", self.inner, get_args(Inner))
        _check(self.mode is None or isinstance(self.mode, str), "mode", "a mode of torch.compile or None", self.mode)
        for name in ("strict", "verify"):
            _check(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        folder = self.debug_dir
        _check(
            folder is None or (isinstance(folder, (str, PathLike)) and bool(str(folder))), "debug_dir", FOLDER, folder
        )

    def budget_bytes(self, device_memory: int) -> int | None:
        """Return `memory_budget` in bytes, None where it is not set.

        Args:
            device_memory: memory of the device in bytes.
        """
        if isinstance(self.memory_budget, str):
            number, unit = _amount(self.memory_budget)
            return int(number * unit)
        if isinstance(self.memory_budget, float):
            return int(self.memory_budget * device_memory)
        return self.memory_budget

    @property
    def least_bytes(self) -> int:
        """`min_bytes`, by default 64 MiB: smaller temporaries are not worth the launches of a loop."""
        return SMALL_BYTES if self.min_bytes is None else self.min_bytes

    @property
    def least_sent(self) -> int:
        """Bytes of the smallest value that goes to the host: 8 MiB, or `min_bytes` where that is less."""
        return min(SMALL_VALUE, self.least_bytes)

    def wish_over_heads(self, modules: Collection[str]) -> Wish:
        """Return the same for a region over heads, which has no tokens to count."""
        loop = self.wish_for(modules).loop
        groups = self.head_groups
        return Wish(loop if groups is None or loop is False else groups > 1, None, groups)

    def wish_for(self, modules: Collection[str]) -> Wish:
        """Return what the user wants for a region whose nodes belong to the modules with these paths."""
        paths = [path for path in self.modules if any(matches(module, path) for module in modules)]
        said = self.modules[max(paths, key=len)] if paths else {}
        if isinstance(said, bool):
            return Wish(said, self.chunk_tokens, self.num_chunks)
        return Wish(None, **said) if said else Wish(None, self.chunk_tokens, self.num_chunks)

    @staticmethod
    def split(options: Mapping[str, Any] | None, foreign: Collection[str]) -> tuple[Config, dict[str, Any]]:
        """Divide torch.compile's `options` into ours and Inductor's.

        Args:
            options: as given to torch.compile.
            foreign: the names that the inner compiler takes.

        Raises:
            ValueError: a name that neither knows; the message lists ours.
            TypeError: a value that its option does not take, or `options` is no dict.
        """
        own = {field.name for field in dataclasses.fields(Config)}
        if not isinstance(options, Mapping | None):
            taking = sorted(own - {"disable", "mode", "debug_dir"})
            raise no_options(options, [name for name in taking if _takes(name, options)])
        mine: dict[str, Any] = {}
        theirs: dict[str, Any] = {}
        for name, value in (options or {}).items():
            if name in own:
                mine[name] = value
            elif str(name).replace("-", "_") in foreign:
                theirs[name] = value
            else:
                raise unknown(name, own, foreign)
        if isinstance(mine.get("disable"), (list, str)):
            mine["disable"] = (mine["disable"],) if isinstance(mine["disable"], str) else tuple(mine["disable"])
        return Config(**mine), theirs


LENGTHS = ("chunk_tokens", "num_chunks")
NUMBERS = (*LENGTHS, "head_groups")
SMALL_BYTES = 64 * 2**20
SMALL_VALUE = 8 * 2**20
BUDGETS = "bytes as an int, a string like '40GiB', or a fraction of the device between 0.0 and 1.0"
WISHES = "a dict from module paths to False, True, {'chunk_tokens': n} or {'num_chunks': n}"
FOLDER = "the path of a folder or None"
UNITS = {f"{unit}B": 1000**power for power, unit in enumerate("KMGT", 1)}
UNITS |= {f"{unit}iB": 1024**power for power, unit in enumerate("KMGT", 1)}


def _amount(text: str) -> tuple[float, int]:
    """Return the number and the unit in bytes of "40GiB"; unit 0 for other texts."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text)
    return (float(found[1]), UNITS[found[2]]) if found else (0.0, 0)


def _is_budget(value: object) -> bool:
    if isinstance(value, str):
        return all(_amount(value))
    if isinstance(value, float):
        return 0 < value <= 1
    return value is None or (_is_int(value) and isinstance(value, int) and value > 0)


def _is_wish(path: object, said: object) -> bool:
    if isinstance(said, Mapping):
        return (
            isinstance(path, str)
            and len(said) == 1
            and set(said) <= {*LENGTHS}
            and all(_is_int(value) and value > 0 for value in said.values())
        )
    return isinstance(path, str) and isinstance(said, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _takes(name: str, value: Any) -> bool:
    """Return whether an option takes a value."""
    try:
        Config(**{name: value})
    except (TypeError, ValueError):
        return False
    return True


def _check(holds: bool, name: str, expected: str, value: object, known: Collection[str] = ()) -> None:
    """Raise the error for a value that an option does not take; `known` are the texts that it takes."""
    if not holds:
        raise wrong(name, expected, value, known)
