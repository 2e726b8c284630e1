"""A digest of all that decides what program a model has: its state without the weights, its code as it is in memory, and the settings that code reads.

Before: a module
After:  "9f2c…", equal in another process if the model there is built by the same code from the same configuration

What cannot be told apart from others of its kind (a lock, a generator, an object of an extension) raises: no digest is better than a wrong one.
"""

from __future__ import annotations

import collections
import enum
import functools
import hashlib
import logging
import os
import sys
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.layout, torch.memory_format, type(...))
TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
CONTAINERS = (list, tuple, set, frozenset, Mapping)
ELSEWHERE = (*sys.stdlib_module_names, "torch", "numpy", "sympy", "seqpar", "triton")  # their versions count
DICTIONARIES = (dict, collections.OrderedDict, collections.defaultdict)
GLOBAL_DEPTH = 3
OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
BUILTINS = types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType


class Unknown(Exception):  # noqa: N818 - an answer, not an error
    """Nothing tells this value apart from others: where it is, and what it is."""


class Digest:
    """Collects facts; the order of the calls counts."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # ids stay theirs
        self.code = Code()

    def text(self, *facts: Any) -> None:
        for fact in facts:
            data = str(fact).encode(errors="surrogatepass")
            self.hash.update(len(data).to_bytes(8, "little") + data)

    # ---- state: every value must be known

    def value(self, value: Any, path: str) -> None:
        """Anything that a model may hold.

        Raises:
            Unknown: it, or something in it, cannot be told apart from others.
        """
        if isinstance(value, PLAIN) and not isinstance(value, enum.Enum):
            self.text(type(value).__qualname__, repr(value))
            return
        if id(value) in self.seen:
            self.text("again", self.seen[id(value)])
            return
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        if isinstance(value, torch.Tensor):
            self.tensor(value, path)
        elif isinstance(value, torch.device):
            self.text("device", value.type)  # every rank has its own
        elif isinstance(value, type):
            self.kind(value)
        elif isinstance(value, types.ModuleType):
            self.text("file", value.__name__)
        elif isinstance(value, logging.Logger):
            self.text("logger", value.name)
        elif callable(value) and self.function(value, path):
            pass
        else:
            self.object(value, path)

    def tensor(self, value: torch.Tensor, path: str) -> None:
        """Shape, dtype, strides; the content of what is neither parameter nor buffer, which may be a constant of the program."""
        if type(value) not in TENSORS:
            raise Unknown(f"{path} is a {type(value).__qualname__}")
        named = path.rpartition(".")[0].endswith(("._parameters", "._buffers"))
        strides = value.stride() if value.layout is torch.strided else value.layout
        self.text(type(value).__qualname__, f"{tuple(value.shape)} {value.dtype} {strides} {value.device.type}", "" if named else tensor_text(value))

    def object(self, value: Any, path: str) -> None:
        """Containers, modules, enumerations and plain objects."""
        self.kind(type(value))
        known = False
        if isinstance(value, enum.Enum):
            self.text(value.name)
            return
        if isinstance(value, set | frozenset):
            self.text(*sorted(digest_of(item, path) for item in value))
            known = True
        elif isinstance(value, CONTAINERS):
            pairs = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
            self.text(len(pairs))
            for key, item in pairs:
                self.value(key, f"a key of {path}")
                self.part(key, item, path)
            known = True
        elif type(value).__module__ == "numpy" and not value.dtype.hasobject:
            self.text(value.dtype, value.shape, hashlib.sha256(value.tobytes()).hexdigest())
            return
        slots = [name for kind in type(value).__mro__ for name in slot_names(kind) if hasattr(value, name)]
        if not known and not slots and not hasattr(value, "__dict__"):
            raise Unknown(f"{path} is a {type(value).__module__}.{type(value).__qualname__}")
        for name, item in [*vars(value).items()] if hasattr(value, "__dict__") else []:
            self.text(name)
            # Hooks are numbered through the life of a process.
            self.part(name, list(item.values()) if isinstance(value, torch.nn.Module) and "_hooks" in name and isinstance(item, dict) else item, path)
        for name in slots:
            self.text(name)
            self.value(getattr(value, name), f"{path}.{name}")

    def part(self, name: Any, value: Any, path: str) -> None:
        """An attribute or entry. A private list of words is often made from a set, in another order at every start: its order does not count."""
        if isinstance(name, str) and name.startswith("_") and type(value) is list and all(type(item) is str for item in value):
            value = sorted(value)
        self.value(value, f"{path}.{name}" if isinstance(name, str | int) else path)

    def finish(self) -> str:
        """Add the code behind what was met; the digest."""
        self.text(*self.code.text())
        return self.hash.hexdigest()

    def function(self, value: Any, path: str) -> bool:
        """A function with all it closes over; False if the value is none."""
        if isinstance(value, types.FunctionType):
            self.text("function", value.__module__, value.__qualname__, code_text(value.__code__))
            self.code.add(value)
            cells = [cell.cell_contents for cell in value.__closure__ or () if has_content(cell)]
            for part in (value.__defaults__, value.__kwdefaults__, cells):
                self.value(part, f"what {path} closes over")
        elif isinstance(value, types.MethodType):
            self.value(value.__func__, path)
            self.value(value.__self__, f"the object of {path}")
        elif isinstance(value, functools.partial):
            self.value([value.func, value.args, value.keywords], path)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.value(value.__wrapped__, path)
        elif isinstance(value, OPERATORS):
            self.text("operator", value)
        elif isinstance(value, BUILTINS):
            owner = getattr(value, "__self__", None)
            self.text("builtin", getattr(value, "__module__", None), value.__qualname__)
            if owner is not None and not isinstance(owner, types.ModuleType | type):
                self.value(owner, f"the object of {path}")
        else:
            return False
        return True

    def kind(self, kind: type) -> None:
        """A class: its name, and later its code."""
        self.text("class", kind.__module__, kind.__qualname__)
        self.code.add(kind)


class Code:
    """The code that a call may run, as it is in memory: `forward` and the special methods of the classes met, what these name, and so on; with the
    values of the global variables they name. A member of a class counts once any of this code has its name.

    Of an installed package that defines no layer of the model, only the version counts.
    """

    def __init__(self) -> None:
        self.packages: set[str] = set()  # that define layers
        self.todo: list[Any] = []
        self.named = {"forward"}
        self.waiting: dict[str, list[tuple[str, Any]]] = {}
        self.facts: dict[str, str] = {}

    def add(self, *found: Any) -> None:
        """A class or a function. Which packages define layers must be known before any code is followed."""
        self.todo += found
        self.packages |= {kind.__module__.partition(".")[0] for kind in found if isinstance(kind, type) and issubclass(kind, torch.nn.Module)}

    def text(self) -> list[str]:
        """All facts, in an order of their own."""
        seen: dict[int, Any] = {}
        while self.todo:
            item = self.todo.pop()
            if id(item) in seen or is_elsewhere(item.__module__ or ""):
                continue
            seen[id(item)] = item
            if isinstance(item, type):
                self.add(*item.__mro__[1:])
                self.members(item)
            elif self.counts(item.__globals__):
                self.function(item)
        return sorted(f"{name} = {text}" for name, text in self.facts.items())

    def members(self, kind: type) -> None:
        """What a class defines; a layer is there already, so its `__init__` is not called."""
        made = ("__init__", "__new__") if issubclass(kind, torch.nn.Module) else ()
        for name, member in list(vars(kind).items()):
            if name in ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", *made) or name.startswith("_abc"):
                continue
            place = f"{kind.__module__}.{kind.__qualname__}.{name}"
            if name in self.named or (name.startswith("__") and name.endswith("__")):
                self.name(place, member, ())
            else:
                self.waiting.setdefault(name, []).append((place, member))

    def counts(self, names: Mapping[str, Any]) -> bool:
        """True for a file (its variables) whose code counts; of others the version is noted."""
        package = str(names.get("__name__")).partition(".")[0]
        installed = not {"site-packages", "dist-packages"}.isdisjoint(Path(names.get("__file__") or "").parts)
        if is_elsewhere(package) or (installed and package not in self.packages):
            self.facts[f"version of {package}"] = str(vars(sys.modules[package]).get("__version__")) if package in sys.modules else ""
            return False
        return True

    def function(self, function: types.FunctionType) -> None:
        """What a function names: variables of its file, and of other files by way of their modules; variables of the environment."""
        names, constants = named_by(function.__code__)
        for name in sorted(names & function.__globals__.keys()):
            self.name(f"{function.__globals__.get('__name__')}.{name}", function.__globals__[name], names)
        for cell in function.__closure__ or ():
            if has_content(cell):
                self.follow(cell.cell_contents, names, GLOBAL_DEPTH)
        texts = {text for text in constants if isinstance(text, str) and text.isidentifier()}
        if {"environ", "getenv"} & names:
            self.facts |= {f"${name}": str(os.environ.get(name)) for name in texts}
        for name in (names | texts) - self.named:
            self.named.add(name)
            for place, member in self.waiting.pop(name, ()):
                self.name(place, member, ())

    def name(self, place: str, value: Any, names: Collection[str]) -> None:
        """A variable with what it holds. names: what else the code that names it names."""
        if place in self.facts:
            return
        self.facts[place] = setting(value, GLOBAL_DEPTH)
        self.follow(value, names, GLOBAL_DEPTH)

    def follow(self, value: Any, names: Collection[str], depth: int) -> None:
        """The code behind a value."""
        if isinstance(value, types.ModuleType):
            inside = vars(value)
            if self.counts(inside):
                for name in sorted(inside.keys() & set(names)):
                    self.name(f"{inside.get('__name__')}.{name}", inside[name], names)
        elif isinstance(value, type | types.FunctionType):
            self.todo.append(value)
            wrapped = getattr(value, "__wrapped__", None)
            if depth and wrapped is not None:
                self.follow(wrapped, names, depth - 1)
        elif isinstance(value, staticmethod | classmethod | types.MethodType):
            self.follow(value.__func__, names, depth)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.follow(value.__wrapped__, names, depth)
        elif isinstance(value, property):
            self.follow((value.fget, value.fset), names, depth)
        elif type(value) in (list, tuple, set, frozenset, *DICTIONARIES):
            for item in list(value.values() if isinstance(value, dict) else value) if depth else ():
                self.follow(item, names, depth - 1)
        elif not isinstance(value, PLAIN):
            self.todo.append(type(value))


def named_by(code: types.CodeType) -> tuple[set[str], list[Any]]:
    """Names and constants in a function and the functions inside it."""
    names, constants = set(code.co_names), list(code.co_consts)
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            inner, more = named_by(part)
            names |= inner
            constants += more
    return names, constants


def setting(value: Any, depth: int) -> str:
    """What a global variable or class attribute holds, as far as it is plain."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, staticmethod | classmethod | types.MethodType):
        value = value.__func__
    if isinstance(value, property):
        return setting((value.fget, value.fset), depth)
    if isinstance(value, functools._lru_cache_wrapper):
        value = value.__wrapped__
    if isinstance(value, types.FunctionType):
        cells = [setting(cell.cell_contents, depth - 1) for cell in value.__closure__ or () if has_content(cell)] if depth else []
        return f"{value.__module__}.{value.__qualname__} {code_text(value.__code__)} {setting(value.__defaults__, depth)} {cells}"
    if isinstance(value, functools.partial):
        return f"partial {setting([value.func, value.args, value.keywords], depth)}"
    if isinstance(value, torch.Tensor):
        return tensor_text(value) if type(value) in TENSORS else type(value).__qualname__
    if isinstance(value, type | BUILTINS):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    if isinstance(value, OPERATORS):
        return str(value)
    title = f"{type(value).__module__}.{type(value).__qualname__}"
    if depth == 0 or isinstance(value, types.ModuleType | logging.Logger):
        return title
    # Of exactly these types: others may import something, or refuse, when they are read.
    if type(value) in DICTIONARIES:
        return f"{title} {sorted((setting(k, depth - 1), setting(v, depth - 1)) for k, v in list(value.items()))}"
    if type(value) in (list, tuple, set, frozenset):
        items = [setting(item, depth - 1) for item in list(value)]
        return f"{title} {sorted(items) if isinstance(value, set | frozenset) else items}"
    try:
        state = {} if is_elsewhere(type(value).__module__) else object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        state = {}
    return f"{title} {[(name, setting(item, depth - 1)) for name, item in sorted(state.items())]}"


def code_text(code: types.CodeType) -> str:
    """A digest of what a function does; where it stands in its file does not count."""
    constants = [code_text(part) if isinstance(part, types.CodeType) else repr(sorted(part, key=repr) if isinstance(part, frozenset) else part) for part in code.co_consts]
    text = f"{code.co_code!r} {constants} {code.co_names} {code.co_varnames} {code.co_freevars} {code.co_cellvars} {code.co_flags}"
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def has_content(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def slot_names(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return tuple(name for name in ((slots,) if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__"))


def is_elsewhere(module: str) -> bool:
    """True for what has a version of its own: the standard library, torch."""
    return module.partition(".")[0] in ELSEWHERE


def digest_of(value: Any, path: str) -> str:
    """The digest of one value on its own."""
    digest = Digest()
    digest.value(value, path)
    return digest.hash.hexdigest()


def tensor_text(value: torch.Tensor) -> str:
    """Shape, dtype and content of a tensor that is neither parameter nor buffer: it may be a constant of a program."""
    text = f"{tuple(value.shape)} {value.dtype}"
    if value.device.type == "meta" or value.layout is not torch.strided:
        return text
    flat = value.detach().cpu().resolve_conj().contiguous().reshape(-1)
    return f"{text} {hashlib.sha256(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b'').hexdigest()[:16]}"


def replaced_in_torch() -> list[str]:
    """Functions of torch that somebody else has put there."""
    found = []
    for owner in (torch, torch.nn.functional, torch.Tensor, torch.nn.Module):
        for name, value in sorted(vars(owner).items()):
            home = getattr(value, "__module__", None)
            if isinstance(value, types.FunctionType) and home and not is_elsewhere(home):
                found.append(f"{name} {setting(value, GLOBAL_DEPTH)}")
    return found


def own_code() -> str:
    """A digest of this package."""
    root = Path(__file__).parents[1]
    folders = (root, *(root / name for name in ("passes", "partitioner", "partitioner/rules", "runtime")))
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def torch_settings(device: str) -> list[str]:
    """What torch itself lets a program depend on."""
    kinds = [kind for kind in dict.fromkeys(("cpu", device)) if kind != "meta"]
    casts = [f"{kind} {torch.is_autocast_enabled(kind)} {torch.get_autocast_dtype(kind)}" for kind in kinds]
    kernels = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math", "cudnn")]
    versions = [sys.version, torch.__version__, torch.version.git_version]
    return [str(fact) for fact in (versions, casts, kernels, torch.get_default_dtype(), torch.get_default_device().type, torch.are_deterministic_algorithms_enabled(), replaced_in_torch())]
