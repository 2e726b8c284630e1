"""Submodules of a model that are alike: built the same way, of the same code, so that equal calls do the same with other weights.

Before: blocks = ModuleList(Block(width=64), Block(width=64), Block(width=64), Last())
After:  the first three, with one digest; their inner modules are not looked at

Alike: one class, and a state that differs in nothing but the content of parameters and buffers (`state_digest.py`). What a block may depend on besides
(variables of its code's files, attributes of its classes) is the same for all of them at any time; `Surroundings` tells whether it changes.
"""

from __future__ import annotations

import contextvars
import types
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from seqpar.passes.effects import StateWatch, same
from seqpar.passes.state_digest import GLOBAL_DEPTH, Code, Digest, Unknown, has_content
from seqpar.passes.warm import CONTAINERS

ENOUGH = 3  # of two, the second is traced to see that it does what the first did
INNER_MODULES = 3  # of a block with fewer, a call is told from others no faster than it is traced
LIMIT = 5_000  # values in one block (a large one has 650); one that holds many blocks, or tables of numbers, has more
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
MISSING = object()


@dataclass(frozen=True)
class Block:
    """A submodule that has others like it. path: its name in the model. kind: equal for those alike. slots: where its parameters and buffers are."""

    path: str
    module: nn.Module
    kind: str
    slots: tuple[tuple[dict[str, Any], str], ...]
    surroundings: Surroundings


def alike(model: nn.Module) -> list[Block]:
    """The outermost submodules of which a list holds several alike."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return list(_below(model, "", names))


def _below(module: nn.Module, path: str, names: Mapping[int, int]) -> Iterator[Block]:
    found = dict(_of_list(module, path, names)) if isinstance(module, LISTS) else {}
    for name, child in module.named_children():
        if name in found:
            yield found[name]
        else:
            yield from _below(child, f"{path}.{name}" if path else name, names)


def _of_list(parent: nn.Module, path: str, names: Mapping[int, int]) -> Iterator[tuple[str, Block]]:
    """The children of a list that are alike, by name."""
    classes = Counter(type(child) for child in parent.children())
    groups = defaultdict(list)
    for name, child in parent.named_children():
        parts = list(child.modules())
        # A module with two names is noted under the first, wherever it is called.
        if classes[type(child)] >= ENOUGH and len(parts) > INNER_MODULES and all(names[id(part)] == 1 for part in parts):
            digest = BlockDigest(child)
            try:
                digest.value(child, "")
            except Unknown:
                continue
            groups[digest.hash.hexdigest()].append((name, child, digest))
    for kind, members in groups.items():
        if len(members) >= ENOUGH:
            surroundings = members[0][2].surroundings
            try:
                surroundings.find()
            except Unknown:
                continue
            for name, child, _ in members:
                yield name, Block(f"{path}.{name}" if path else name, child, kind, slots_of(child), surroundings)


def slots_of(module: nn.Module) -> tuple[tuple[dict[str, Any], str], ...]:
    """(dictionary, name) of every parameter and buffer."""
    dictionaries = (names for part in module.modules() for names in (part._parameters, part._buffers))
    return tuple((names, name) for names in dictionaries for name, value in names.items() if value is not None)


class BlockDigest(Digest):
    """The digest of a module's state. It refuses functions that bring state of their own, which nobody watches."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.surroundings = self.code = Surroundings()
        self.inside = {id(part) for part in module.modules()}

    def value(self, value: Any, path: str) -> None:
        if len(self.kept) > LIMIT:
            raise Unknown(f"{path} holds too much")
        super().value(value, path)

    def function(self, value: Any, path: str) -> bool:
        owner = getattr(value, "__self__", None)
        closes = isinstance(value, types.FunctionType) and value.__closure__
        if closes or not (owner is None or isinstance(owner, types.ModuleType | type) or id(owner) in self.inside):
            raise Unknown(f"{path} is a function with a state of its own")
        return super().function(value, path)


class Surroundings(Code):
    """What the code of a block names outside of it: variables of files, attributes of classes, values that functions close over."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[tuple[int, str], tuple[Mapping[str, Any], str]] = {}
        self.cells: dict[int, types.CellType] = {}
        self.of_functions: list[Any] = []  # containers of defaults and attributes

    def find(self) -> None:
        """Follow the code.

        Raises:
            Unknown: it names something whose state cannot be seen.
        """
        self.text()
        for names, name in self.places.values():
            value = names.get(name)
            if isinstance(value, nn.Module) or hasattr(type(value), "__next__"):
                raise Unknown(f"{name} has a state that is not watched")

    def note(self, names: Mapping[str, Any], wanted: Collection[str]) -> None:
        self.places |= {(id(names), name): (names, name) for name in wanted if name in names}

    def name(self, place: str, value: Any, names: Collection[str]) -> None:
        if place not in self.facts:  # the values themselves are compared, not texts of them
            self.facts[place] = ""
            self.follow(value, names, GLOBAL_DEPTH)

    def function(self, function: types.FunctionType) -> None:
        self.note(function.__globals__, set(_names(function.__code__)))
        self.cells |= {id(cell): cell for cell in function.__closure__ or () if has_content(cell)}
        self.of_functions += [vars(function), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        super().function(function)

    def follow(self, value: Any, names: Collection[str], depth: int) -> None:
        if isinstance(value, types.ModuleType) and self.counts(vars(value)):
            self.note(vars(value), names)
        super().follow(value, names, depth)

    def members(self, kind: type) -> None:
        self.note(vars(kind), vars(kind).keys() - {"__dict__", "__weakref__"})
        super().members(kind)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _names(part)


class SurroundingsWatch:
    """The values of surroundings as they were."""

    def __init__(self, surroundings: Surroundings) -> None:
        self.places = [(names, name, names.get(name, MISSING)) for names, name in surroundings.places.values()]
        self.cells = [(cell, cell.cell_contents) for cell in surroundings.cells.values()]
        values = [value for *_, value in self.places] + [value for _, value in self.cells] + surroundings.of_functions
        self.variables = [(value, value.get(MISSING)) for value in values if isinstance(value, contextvars.ContextVar)]
        # Subclasses of containers, and modules, may import something when they are read.
        self.contents = StateWatch(values=[value for value in values if type(value) in CONTAINERS or not isinstance(value, (*CONTAINERS, types.ModuleType))])

    def changed(self) -> bool:
        return (
            any(not same(before, names.get(name, MISSING)) for names, name, before in self.places)
            or any(not has_content(cell) or not same(before, cell.cell_contents) for cell, before in self.cells)
            or any(not same(before, variable.get(MISSING)) for variable, before in self.variables)
            or self.contents.changed() is not None
        )
