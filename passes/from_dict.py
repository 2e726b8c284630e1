"""Frozen dataclasses from what JSON keeps of them, by the types of their fields.

Before: {"ulysses": 2, "flops_per_rank": [10, 12], …}
After:  Plan(ulysses=2, flops_per_rank=(10, 12), …)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def read_dataclass(kind: Any, data: Any) -> Any:
    """A value of the type `kind` (a dataclass, a tuple, a mapping or a plain one) from what JSON keeps of it; what `kind` does not have is left out."""
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return read_fields(kind, data)
    if origin in (Union, UnionType):
        rest = [part for part in parts if part is not type(None)]
        return None if data is None else read_dataclass(rest[0], data) if len(rest) == 1 else data
    if origin is tuple:
        return tuple(read_dataclass(parts[0 if parts[-1] is Ellipsis else i], item) for i, item in enumerate(data))
    if origin is list:
        return [read_dataclass(parts[0], item) for item in data]
    if origin in (dict, Mapping):
        return {read_key(parts[0], key): read_dataclass(parts[1], item) for key, item in data.items()}
    if kind in (int, float, str, bool) and not isinstance(data, (int, float) if kind is float else kind):
        raise ValueError(f"{data!r:.60} is no {kind.__name__}")
    return data


def read_key(kind: Any, key: Any) -> Any:
    """JSON keeps keys as text."""
    return int(key) if kind is int else key


def read_fields(kind: Any, data: Mapping[str, Any]) -> Any:
    """A dataclass from its fields."""
    # Field by field: the types of those that no file has may be known to type checkers only.
    named = SimpleNamespace(__annotations__={one.name: one.type for one in fields(kind) if one.name in data})
    types = get_type_hints(named, globalns=vars(sys.modules[kind.__module__]))
    required = [one.name for one in fields(kind) if one.init and one.default is MISSING and one.default_factory is MISSING]
    if missing := [name for name in required if name not in data]:
        raise ValueError(f"a {kind.__name__} needs {', '.join(missing)}")
    return kind(**{one.name: read_dataclass(types[one.name], data[one.name]) for one in fields(kind) if one.init and one.name in data})
