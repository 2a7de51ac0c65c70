"""Calls of aten ops, drawn from their schemas: every argument, by position or by keyword, given or left out.

A draw that the op itself refuses is drawn anew; what the types of a schema do not say, `recipes` do.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from recipes import OMIT, RECIPES, Draw


class Drawn(NamedTuple):
    """What an op is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def draw_call(op: torch._ops.OpOverload, draw: Draw, tries: int = 200) -> Drawn | None:
    """A call that runs; None where none was found."""
    for _ in range(tries):
        draw.gradients = draw.random() < 0.6
        try:
            args, kwargs = _drawn(op, draw)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                op(*args, **kwargs)
            return Drawn(args, kwargs)
        except (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError):
            continue
    return None


def _drawn(op: torch._ops.OpOverload, draw: Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name, then by position and by keyword."""
    elementwise = torch.Tag.pointwise in op.tags
    values: dict[str, Any] = {"*shape": draw.shape(), "*dtype": draw.choice(DTYPES)}
    recipe = RECIPES.get(op, {})
    for argument in op._schema.arguments:
        if argument.name in values:
            continue  # another argument's recipe has drawn it
        if argument.name in recipe:
            values[argument.name] = recipe[argument.name](draw, values)
        elif argument.has_default_value() and draw.random() < 0.35:
            values[argument.name] = OMIT
        elif str(argument.type) == "Tensor" and not elementwise and not _has_tensor(values):
            values[argument.name] = draw.values(values["*shape"], values["*dtype"])  # dims are drawn for its shape
        else:
            values[argument.name] = _of_type(argument, draw, values)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    by_keyword = False
    for argument in op._schema.arguments:
        value = values[argument.name]
        by_keyword |= argument.kwarg_only or value is OMIT or (bool(args) and draw.random() < 0.1)
        if value is not OMIT and by_keyword:
            kwargs[argument.name] = value
        elif value is not OMIT:
            args.append(value)
    return tuple(args), kwargs


def _has_tensor(values: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values.values())


DTYPES = (torch.float64,) * 5 + (torch.int64, torch.bool, torch.float32)
SCALARS = (0, 1, 2, -1, 3, 0.5, -2.5)
STRINGS = {
    "approximate": ("none", "tanh"),
    "rounding_mode": (None, "floor", "trunc"),
    "reduce": ("sum", "prod", "mean", "amax", "amin"),
    "side": (None, "left", "right"),
}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "dtype": (None, torch.float64, torch.float32, torch.int64, torch.bool),
    "out_dtype": (None,),
    "memory_format": (None, torch.contiguous_format, torch.preserve_format),
    "layout": (None, torch.strided),
    "device": (None, torch.device("cpu")),
    "pin_memory": (None, False),
    "generator": (None,),
}


def _of_type(argument: Any, draw: Draw, values: dict[str, Any]) -> Any:
    kind, name, shape = str(argument.type), argument.name, values["*shape"]
    if name in OPTIONS:
        return draw.choice(OPTIONS[name])
    if name in STRINGS:
        return draw.choice(STRINGS[name])
    if kind.startswith("Optional"):
        if draw.random() < 0.2:
            return None
        kind = kind.removeprefix("Optional[").removesuffix("]")
    if kind == "Tensor":
        dtype = values["*dtype"] if draw.random() < 0.9 else draw.choice(DTYPES)
        return draw.values(draw.broadcast(shape), dtype)
    if kind == "int":
        is_dim = name in ("dim", "dim0", "dim1", "dim2")
        return draw.dim(shape) if is_dim else draw.choice((1, 2, 3, 0, -1))
    if kind == "List[int]":
        return draw.dims(shape)
    drawn = {
        "number": lambda: draw.choice(SCALARS),
        "float": lambda: float(draw.choice(SCALARS)),
        "bool": lambda: draw.random() < 0.5,
    }
    return drawn[kind]()
