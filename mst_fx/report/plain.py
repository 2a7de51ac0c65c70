"""A report as plain types, and as JSON."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any


def plain(value: Any) -> Any:
    """Return a value with its dataclasses as dicts and its tuples as lists; numbers, strings and None stay."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return [plain(each) for each in value] if isinstance(value, tuple) else value


def json_of(value: Any, indent: int | None) -> str:
    """Return plain types as JSON."""
    return json.dumps(value, indent=indent)
