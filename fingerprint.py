"""What a program depends on of its model, as facts that can be compared later, one by one and by name.

Before: a module
After:  {"parameter proj.weight": "(8, 8) float32", "attribute blocks.0.scale": "0.5", "source of my_model": "sha256 …", …}

Weights are not among them: a program is the same for other weights.
"""

import enum
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from seqpar.passes.state_digest import tensor_text

NUMBERS = (bool, int, float, complex, torch.dtype)
PLAIN = (*NUMBERS, str, bytes, type(None), enum.Enum, range, slice)
DEPTH = 4


def model_facts(model: torch.nn.Module) -> dict[str, str]:
    """Class, mode, shapes and dtypes of parameters and buffers, plain attributes of all modules and of objects in them, and the source code of
    their classes."""
    facts = {"class": f"{type(model).__module__}.{type(model).__qualname__}", "training": str(model.training)}
    for kind, tensors in (("parameter", model.named_parameters(remove_duplicate=False)), ("buffer", model.named_buffers(remove_duplicate=False))):
        facts |= {f"{kind} {name}": f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in tensors}
    for name, module in model.named_modules():
        facts |= {f"attribute {f'{name}.' if name else ''}{key}": text for key, text in attributes(module.__dict__, DEPTH)}
        facts |= source_of(type(module))
    return facts


def attributes(values: Mapping[str, Any], depth: int) -> Iterator[tuple[str, str]]:
    """(name, text) of what is plain; of private names only numbers, since the others are caches and hooks, not settings."""
    for name, value in values.items():
        if isinstance(value, torch.nn.Module) or name in ("_parameters", "_buffers", "_modules"):
            continue
        if isinstance(value, torch.Tensor):
            yield name, tensor_text(value)
        elif isinstance(value, NUMBERS) or (not name.startswith("_") and is_plain(value, depth)):
            yield name, repr(sorted(value, key=repr) if isinstance(value, set | frozenset) else value)
        elif callable(value) and hasattr(value, "__qualname__"):
            yield name, f"{value.__module__}.{value.__qualname__}"
        elif not name.startswith("_") and depth and type(value).__module__.partition(".")[0] not in ("builtins", "torch") and hasattr(value, "__dict__"):
            yield from ((f"{name}.{key}", text) for key, text in attributes(vars(value), depth - 1))


def is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, Mapping):
        return depth > 0 and all(is_plain(item, depth - 1) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return depth > 0 and all(is_plain(item, depth - 1) for item in value)
    return isinstance(value, PLAIN)


def source_of(kind: type) -> dict[str, str]:
    """The file that defines a class; torch itself has a version."""
    module = sys.modules.get(kind.__module__)
    path = getattr(module, "__file__", None)
    if kind.__module__.partition(".")[0] == "torch" or path is None or not Path(path).is_file():
        return {}
    return {f"source of {kind.__module__}": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}


def first_difference(saved: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The first fact that differs, in words, or None. A tensor that the model makes when it first runs may be missing in one of them."""
    for name in dict.fromkeys([*saved, *found]):
        then, now = saved.get(name), found.get(name)
        if then == now or (name.startswith("attribute") and {then, now} & {None, "None"} and is_made_later(then, now)):
            continue
        return f"{name} is {now or 'absent'}, and was {then or 'absent'}"
    return None


def is_made_later(then: str | None, now: str | None) -> bool:
    made = next((text for text in (then, now) if text not in (None, "None")), "")
    return made.startswith("(") and "torch." in made
