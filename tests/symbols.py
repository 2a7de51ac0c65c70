"""Numbers that are only known at run time, as a capture makes them; what it has captured is their hint."""

from __future__ import annotations

from itertools import count
from typing import Any

from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

_NUMBERS = count()


def varying(shape_env: ShapeEnv, hint: float) -> Any:
    """A symbol of its own, for a size of 2 or more or for a float."""
    source = ConstantSource(f"number{next(_NUMBERS)}")
    symbol = shape_env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    create = shape_env.create_symfloatnode if isinstance(hint, float) else shape_env.create_symintnode
    return create(symbol, hint=hint, source=source)
