"""Inputs of a model from a JSON file.

    {"hidden_states": {"shape": [1, 64, 16]}, "timestep": {"shape": [1], "dtype": "int64", "high": 1000}, "ids": {"values": [[0, 1], [0, 2]]}, "return_dict": false}

A tensor is an object with `shape` (seeded random: normal, or integers in [0, high), or booleans) or with `values`; lists and objects may hold tensors; anything else is taken as it is.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from seqpar.errors import SeqparError

TENSOR_KEYS = {"shape", "dtype", "high", "values"}


def read_inputs(path: Path, device: str, dtype: torch.dtype, signature: inspect.Signature) -> dict[str, Any]:
    """The keyword inputs in the file, on `device`; tensors without a dtype have `dtype`.

    Raises SeqparError for a file that is not as described, or names no parameter of the signature.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SeqparError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise SeqparError(f"{path} must hold an object: a value for every parameter, by name")
    generator = torch.Generator().manual_seed(0)
    inputs = {name: _value(item, f"{path}: {name}", device, dtype, generator) for name, item in data.items()}
    try:
        signature.bind(**inputs)
    except TypeError as error:
        raise SeqparError(f"{path} does not fit the model: {error}; it takes {', '.join(signature.parameters)}") from error
    return inputs


def _value(item: Any, where: str, device: str, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if isinstance(item, list):
        return [_value(child, f"{where}[{index}]", device, dtype, generator) for index, child in enumerate(item)]
    if not isinstance(item, dict):
        return item
    if not {"shape", "values"} & item.keys():
        return {key: _value(child, f"{where}[{key!r}]", device, dtype, generator) for key, child in item.items()}
    unknown = sorted(item.keys() - TENSOR_KEYS)
    if unknown:
        raise SeqparError(f"{where}: a tensor has {', '.join(sorted(TENSOR_KEYS))}, not {', '.join(unknown)}")
    kind = getattr(torch, str(item["dtype"]), None) if "dtype" in item else dtype
    if not isinstance(kind, torch.dtype):
        raise SeqparError(f"{where}: {item['dtype']!r} is no dtype of torch (float32, bfloat16, int64, bool, …)")
    if "values" in item:
        return torch.tensor(item["values"], dtype=kind if "dtype" in item else None).to(device)
    return _random(item, kind, generator).to(device)


def _random(item: dict[str, Any], kind: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    shape = item["shape"]
    if kind.is_floating_point or kind.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex64 if kind.is_complex else torch.float32).to(kind)
    high = 2 if kind is torch.bool else int(item.get("high", 2))
    return torch.randint(high, shape, generator=generator).to(kind)
