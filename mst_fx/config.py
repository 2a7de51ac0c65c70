"""The options of the backend: what torch.compile's `options=` may hold besides Inductor's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

Accumulate = Literal["float32", "native"]
ReturnedLogits = Literal["keep", "detach"]
Inner = Literal["inductor", "aot_eager", "eager"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of `mst_fx.backend`.

    Attributes:
        min_bytes: a region whose temporaries are smaller (bytes, over the whole sequence) is left alone; 0 loops all.
        chunk_tokens: tokens in one mini-sequence; None lets the plan choose.
        num_chunks: number of mini-sequences in place of `chunk_tokens`; at most one of the two may be set.
        accumulate: dtype in which the weight gradients of half-precision weights add up over the chunks:
            "float32" (as accurate as no loop; 4 bytes an element while the loop runs) or "native" (the weight's).
        returned_logits: what becomes of logits that the compiled function also returns: "keep" their gradient (a
            backward then starts from a gradient as large as they are, zeros if nobody used it), or "detach" them.
        disable: names of patterns that shall not be used.
        inner: what compiles the rewritten graph: "inductor", "aot_eager", "eager" or a backend callable.
        strict: raise exceptions of the pass itself in place of compiling the graph unrewritten.
    """

    min_bytes: int = 64 * 2**20
    chunk_tokens: int | None = None
    num_chunks: int | None = None
    accumulate: Accumulate = "float32"
    returned_logits: ReturnedLogits = "keep"
    disable: tuple[str, ...] = ()
    inner: Inner | Callable[..., Any] = "inductor"
    strict: bool = False

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for a value that its option does not take."""
        _check(_is_int(self.min_bytes) and self.min_bytes >= 0, "min_bytes", "an int of bytes >= 0", self.min_bytes)
        for name in ("chunk_tokens", "num_chunks"):
            value = getattr(self, name)
            _check(value is None or (_is_int(value) and value > 0), name, "a positive int or None", value)
        if self.chunk_tokens is not None and self.num_chunks is not None:
            raise ValueError("mst_fx: chunk_tokens and num_chunks exclude each other")
        _check(self.accumulate in get_args(Accumulate), "accumulate", str(get_args(Accumulate)), self.accumulate)
        known = self.returned_logits in get_args(ReturnedLogits)
        _check(known, "returned_logits", str(get_args(ReturnedLogits)), self.returned_logits)
        _check(isinstance(self.disable, tuple), "disable", "a tuple or list of pattern names", self.disable)
        known = callable(self.inner) or self.inner in get_args(Inner)
        _check(known, "inner", f"a callable or one of {get_args(Inner)}", self.inner)
        _check(isinstance(self.strict, bool), "strict", "a bool", self.strict)

    @staticmethod
    def split(options: Mapping[str, Any] | None, foreign: frozenset[str]) -> tuple[Config, dict[str, Any]]:
        """Divide torch.compile's `options` into ours and Inductor's.

        Args:
            options: as given to torch.compile.
            foreign: the names that the inner compiler takes.

        Raises:
            ValueError: a name that neither knows; the message lists ours.
            TypeError: a value that its option does not take.
        """
        own = {field.name for field in dataclasses.fields(Config)}
        mine: dict[str, Any] = {}
        theirs: dict[str, Any] = {}
        for name, value in (options or {}).items():
            if name in own:
                mine[name] = value
            elif name.replace("-", "_") in foreign:
                theirs[name] = value
            else:
                listing = ", ".join(sorted(own))
                raise ValueError(f"mst_fx: unknown option {name!r}; ours are {listing}; Inductor's pass through")
        if isinstance(mine.get("disable"), (list, str)):
            mine["disable"] = (mine["disable"],) if isinstance(mine["disable"], str) else tuple(mine["disable"])
        return Config(**mine), theirs


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise TypeError(f"mst_fx: option {name!r} takes {expected}, not {value!r}")
