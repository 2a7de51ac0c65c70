"""What a compiled function returns in place of logits that it never makes: who uses it learns why they are not there.

Python returns it, behind the compiled code: no compiler and no cache meets it. It has no attribute, so code that looks
for tensors among results (of accelerate, DDP, FSDP, pytrees, hooks of modules) leaves it alone, as it does None. It is
false, and equal to None, but a test with `is None` says no: code that looks at logits only if there are any is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn


class NotReturnedError(AttributeError, TypeError):
    """Logits that are not returned are used."""


class NotReturned:
    """Stands in place of logits that are not returned.

    Args:
        why: what they are, why they are not there, and what to do.
    """

    __slots__ = ("_why",)
    __hash__ = object.__hash__

    def __init__(self, why: str) -> None:
        self._why = why

    def __repr__(self) -> str:
        return f"<{self._why}>"

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or self is other or _told(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._why,)

    def __getattr__(self, name: str) -> NoReturn:
        raise NotReturnedError(self._why, name=name, obj=self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Raise the error for a function of torch that is called with such an object, wherever it stands."""
        pending = [*args, *(kwargs or {}).values()]
        while pending:
            value = pending.pop()
            if isinstance(value, cls):
                _told(value)
            pending += value if isinstance(value, (tuple, list)) else ()
        return NotImplemented


def _told(missing: NotReturned, *_: Any, **__: Any) -> NoReturn:
    raise NotReturnedError(missing._why)


_USES = (
    *("getitem", "setitem", "delitem", "len", "iter", "contains", "call", "float", "int", "index", "array"),
    *("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "enter", "exit"),
    *(
        f"{side}{name}"
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
        for side in ("", "r", "i")
    ),
)
for _use in _USES:
    setattr(NotReturned, f"__{_use}__", _told)


def returning(compiled: Callable[..., Any], missing: Mapping[int, NotReturned]) -> Callable[..., Sequence[Any]]:
    """Return a function that gives what a compiled one does, with these objects at the positions of None."""

    def run(*inputs: Any) -> Sequence[Any]:
        results = list(compiled(*inputs))
        for position, instead in missing.items():
            results[position] = instead
        return tuple(results)

    return run
