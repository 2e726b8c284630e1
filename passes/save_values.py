"""Plain values as JSON and back: what nodes, specs and signatures hold. Nothing is evaluated, imported or unpickled.

Before: (1, 0.5, torch.float32, slice(None, 4))
After:  {"tuple": [1, {"float": "0x1.0000000000000p-1"}, {"dtype": "float32"}, {"slice": [null, 4, null]}]}

The device of the model is written as "model": each rank has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from seqpar.compat import pytree
from seqpar.errors import SavedProgramError

# Classes a file may name, besides the containers registered with pytree in this process.
TYPES = {kind.__name__: kind for kind in (type(None), bool, int, float, complex, str, bytes, list, tuple, dict, torch.dtype, torch.device, torch.layout, torch.memory_format)}


@dataclass(frozen=True)
class Codec:
    """Writes and reads values. device: the model's own. node, find: a node as a number, and back; None where there are none."""

    device: torch.device
    node: Callable[[fx.Node], int] | None = None
    find: Callable[[int], fx.Node] | None = None

    def write(self, value: Any) -> Any:
        """`value` as what `json` can hold.

        Raises:
            SavedProgramError: a value of another kind is in it.
        """
        if value is None or isinstance(value, (bool, str)) or type(value) is int:
            return value
        if isinstance(value, float):
            return {"float": value.hex()}
        if isinstance(value, complex):
            return {"complex": [value.real.hex(), value.imag.hex()]}
        if isinstance(value, fx.Node) and self.node is not None:
            return {"node": self.node(value)}
        if isinstance(value, torch.Size):
            return {"size": [int(n) for n in value]}
        if isinstance(value, tuple) and type(value).__name__ in ("tuple", "immutable_tuple"):
            return {"tuple": [self.write(item) for item in value]}
        if isinstance(value, list):
            return [self.write(item) for item in value]
        if isinstance(value, dict) and type(value).__name__ in ("dict", "immutable_dict"):
            return {"dict": [[self.write(key), self.write(item)] for key, item in value.items()]}
        if isinstance(value, slice):
            return {"slice": [self.write(part) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return {type(value).__name__: str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": self.write_device(value)}
        if isinstance(value, type):
            return {"type": type_name(value)}
        raise SavedProgramError(f"a program that holds {value!r:.100} (a {type(value).__module__}.{type(value).__qualname__}) cannot be saved")

    def write_device(self, device: torch.device) -> str:
        if device == self.device or (device.type == self.device.type and device.index is None):
            return "model"
        if device.type in ("cpu", "meta"):
            return device.type
        raise SavedProgramError(f"a program that uses {device} beside the model's {self.device} cannot be saved")

    def read(self, data: Any) -> Any:
        """The inverse of `write`.

        Raises:
            SavedProgramError: `data` was not written by it.
        """
        if data is None or isinstance(data, bool | str | int):
            return data
        if isinstance(data, list):
            return [self.read(item) for item in data]
        if isinstance(data, dict) and len(data) == 1:
            ((kind, content),) = data.items()
            reader = READERS.get(kind)
            if reader is not None:
                try:
                    return reader(self, content)
                except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
                    raise SavedProgramError(f"the file holds {data!r:.100}, which is no {kind}: {error}") from None
        raise SavedProgramError(f"the file holds {data!r:.100}, which is no value of a program")

    def read_node(self, number: Any) -> fx.Node:
        if self.find is None or type(number) is not int:
            raise ValueError("no node is allowed here")
        return self.find(number)

    def read_device(self, name: str) -> torch.device:
        if name not in ("model", "cpu", "meta"):
            raise ValueError("it is neither the model's device nor cpu")
        return self.device if name == "model" else torch.device(name)


def of_torch(kind: type) -> Callable[[Codec, Any], Any]:
    """Reads `torch.<name>` if it is a `kind`."""

    def read(_: Codec, name: Any) -> Any:
        value = getattr(torch, name) if isinstance(name, str) else None
        if not isinstance(value, kind):
            raise ValueError(f"torch has no such {kind.__name__}")
        return value

    return read


READERS: dict[str, Callable[[Codec, Any], Any]] = {
    "float": lambda codec, text: float.fromhex(text),
    "complex": lambda codec, parts: complex(*(float.fromhex(part) for part in parts)),
    "node": Codec.read_node,
    "size": lambda codec, sizes: torch.Size([int(n) for n in sizes]),
    "tuple": lambda codec, items: tuple(codec.read(item) for item in items),
    "dict": lambda codec, items: {codec.read(key): codec.read(item) for key, item in items},
    "slice": lambda codec, parts: slice(*(codec.read(part) for part in parts)),
    "dtype": of_torch(torch.dtype),
    "layout": of_torch(torch.layout),
    "memory_format": of_torch(torch.memory_format),
    "device": Codec.read_device,
    "type": lambda codec, name: find_type(name),
}


def type_name(kind: type) -> str:
    if TYPES.get(kind.__name__) is kind:
        return kind.__name__
    if kind in pytree.SUPPORTED_NODES:
        return f"{kind.__module__}.{kind.__qualname__}"
    raise SavedProgramError(f"a program whose inputs hold a {kind.__module__}.{kind.__qualname__} cannot be saved: pass tensors, numbers, strings and containers of them")


def find_type(name: str) -> type:
    """A class by name: a plain one, or a container this process has registered. Nothing is imported."""
    if name in TYPES:
        return TYPES[name]
    found = [kind for kind in pytree.SUPPORTED_NODES if f"{kind.__module__}.{kind.__qualname__}" == name]
    if len(found) != 1:
        raise SavedProgramError(f"the file names the container {name}, which this process does not know: import what defines it before loading")
    return found[0]


def write_spec(spec: Any, codec: Codec) -> Any:
    """A pytree spec. Raises SavedProgramError for an object of a class that is no registered container."""
    if spec.is_leaf():
        return None
    return [type_name(spec.type), codec.write(spec.context), [write_spec(child, codec) for child in spec.children()]]


def read_spec(data: Any, codec: Codec) -> Any:
    """The inverse of `write_spec`; checked by putting it together once."""
    try:
        spec = build_spec(data, codec)
        pytree.tree_unflatten([0] * spec.num_leaves, spec)
    except SavedProgramError:
        raise
    except Exception as error:
        raise SavedProgramError(f"the file holds a structure that cannot be put together: {type(error).__name__}: {error}") from None
    return spec


def build_spec(data: Any, codec: Codec) -> Any:
    if data is None:
        return pytree.tree_structure(0)
    name, context, children = data
    kind = find_type(name)
    if kind not in pytree.SUPPORTED_NODES:
        raise SavedProgramError(f"the file names {name} as a container")
    return pytree.TreeSpec(kind, codec.read(context), [build_spec(child, codec) for child in children])


def write_tensor(tensor: torch.Tensor) -> tuple[dict[str, Any], bytes]:
    """(shape and dtype, raw content) of a constant.

    Raises:
        SavedProgramError: it has no content.
    """
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or tensor.is_quantized:
        raise SavedProgramError("a program with constants on the meta device, sparse or quantised ones cannot be saved: build the model on a real device")
    own = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    raw = own.reshape(-1).view(torch.uint8).numpy().tobytes() if own.numel() else b""
    return {"shape": list(own.shape), "dtype": str(own.dtype).removeprefix("torch."), "cpu": tensor.device.type == "cpu"}, raw


def read_tensor(data: dict[str, Any], raw: bytes, codec: Codec) -> torch.Tensor:
    """The inverse of `write_tensor`, on the model's device unless it was on the CPU."""
    try:
        shape, dtype = [int(n) for n in data["shape"]], codec.read({"dtype": data["dtype"]})
        if min(shape, default=0) < 0:
            raise ValueError("a negative size")
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype) if raw else torch.empty(0, dtype=dtype)
        value = flat.reshape(shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SavedProgramError(f"the file holds a constant whose content does not fit its shape: {error}") from None
    return value if data.get("cpu") else value.to(codec.device)
