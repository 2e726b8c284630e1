"""What decides a program besides inputs and weights, and may be changed on the model between two calls: plain attributes, containers, layers, hooks.

A call compares all of it, so it is kept as flat lists that Python compares in C: 20 ns a value.
"""

from __future__ import annotations

import logging
import types
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from seqpar.passes.effects import same
from seqpar.passes.state_digest import Code, is_elsewhere, named_by
from seqpar.passes.warm import DEPTH, remember

log = logging.getLogger("seqpar.compile")

MISSING = object()
OF_ANY_MODULE = vars(nn.Module()).keys() - {"training"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
NOT_OF_A_CALL = ("__init__", "__setstate__", "__repr__", "extra_repr", "reset_parameters", "_reset_parameters")
PATIENCE = 8  # programs made for changes of one place; one that changes with every call would have each call compile


class Entry(NamedTuple):
    """An entry of a dictionary as it was. label: where in the model."""

    owner: dict[str, Any]
    key: str
    before: Any
    label: str


class Content(NamedTuple):
    """A container and a copy of it as it was."""

    container: Any
    copy: Any
    label: str


class Attributes(NamedTuple):
    """The attributes of a module, which of them there were, and which a call may read."""

    owner: dict[str, Any]
    known: frozenset[str]
    read: frozenset[str]
    path: str


class ModelWatch:
    """A model's Python state as it is now. Not watched: global variables, what functions close over, what the model's code does not name. ignored: labels to leave out."""

    def __init__(self, model: nn.Module, ignored: Collection[str] = ()) -> None:
        self.ignored = ignored
        self.entries: list[Entry] = []
        self.contents: list[Content] = []
        self.attributes: list[Attributes] = []
        self.no_hooks: list[tuple[dict[int, Any], str]] = []
        read, seen = names_read(model), set[int]()
        for path, module in model.named_modules():
            self._watch(module, path, read[type(module)], seen)
        self._flatten()

    def _watch(self, module: nn.Module, path: str, read: frozenset[str], seen: set[int]) -> None:
        own = vars(module)
        self.attributes.append(Attributes(own, frozenset(own), read, path))
        for name in sorted(own.keys() & read):
            self.entries.append(Entry(own, name, own[name], joined(path, name)))
            self._contain(own[name], joined(path, name), seen)
        # What is a parameter or buffer the program reads anew in each call; None is a constant of it.
        self.entries += [Entry(part, name, None, joined(path, name)) for part in (module._parameters, module._buffers) for name, value in part.items() if value is None]
        if module._modules:
            self._contain(module._modules, f"the layers of {path or 'the model'}", seen)
        for hooks, label in ((own[name], f"the hooks of {path or 'the model'}") for name in HOOKS):
            if hooks:
                self._contain(hooks, label, seen)
            else:
                self.no_hooks.append((hooks, label))

    def _contain(self, value: Any, label: str, seen: set[int]) -> None:
        found: list[tuple[Any, Any]] = []
        remember(value, found, seen, DEPTH)
        self.contents += (Content(container, copy, label) for container, copy in found)

    def _flatten(self) -> None:
        """The same as lists to compare at once."""
        entries = [entry for entry in self.entries if entry.label not in self.ignored]
        contents = [content for content in self.contents if content.label not in self.ignored]
        self._owners, self._keys = [entry.owner for entry in entries], [entry.key for entry in entries]
        self._values = [entry.before for entry in entries]
        self._containers, self._copies = [content.container for content in contents], [content.copy for content in contents]
        self._hooks = [hooks for hooks, label in self.no_hooks if label not in self.ignored]
        self._dictionaries = [attributes.owner for attributes in self.attributes]
        self._lengths = list(map(len, self._dictionaries))

    def changed(self) -> bool:
        """Whether anything is not as it was. Python compares by identity first, and only values that are not the same object by `==`."""
        try:
            return (
                any(self._hooks)
                or list(map(dict.get, self._owners, self._keys)) != self._values
                or self._containers != self._copies
                or list(map(len, self._dictionaries)) != self._lengths
            )
        except Exception:  # tensors and arrays are not compared as a whole: they are other ones
            return True

    def changes(self) -> list[str]:
        """Where in the model something is not as it was. A tensor made anew with the same content is as it was, and an attribute that nobody reads does not count."""
        return [label for label in dict.fromkeys(self._changes()) if label not in self.ignored]

    def _changes(self) -> Iterator[str]:
        yield from (entry.label for entry in self.entries if not equal(entry.before, entry.owner.get(entry.key, MISSING)))
        yield from (content.label for content in self.contents if not equal_contents(content.copy, content.container))
        yield from (label for hooks, label in self.no_hooks if hooks)
        for owner, known, read, path in self.attributes:
            yield from (joined(path, name) for name in sorted((owner.keys() - known) & read))


def names_read(model: nn.Module) -> dict[type, frozenset[str]]:
    """Class -> the attributes of its modules that a call of the model may read: names in all of the model's code, for layers of torch those in their own."""
    modules = list(model.modules())
    kinds = dict.fromkeys(map(type, modules))
    code = Code()
    code.add(*kinds, *dict.fromkeys(type(value) for module in modules for value in vars(module).values() if hasattr(value, "__dict__")))
    code.text()
    return {kind: frozenset({"forward", *(names_of(kind) if is_elsewhere(kind.__module__) else code.named)} - OF_ANY_MODULE) for kind in kinds}


def names_of(kind: type) -> set[str]:
    """Names in the methods of a class and of those it inherits from."""
    parts = [part for part in kind.__mro__ if part not in (nn.Module, object)]
    methods = [value for part in parts for name, value in vars(part).items() if isinstance(value, types.FunctionType) and name not in NOT_OF_A_CALL]
    return set().union(*(named_by(method.__code__)[0] for method in methods))


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def equal(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old is not new:
        alike = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
        return alike and not old.is_meta and torch.equal(old, new)
    return same(old, new)


def equal_contents(old: Any, new: Any) -> bool:
    if isinstance(new, dict):
        return old.keys() == new.keys() and all(equal(old[key], new[key]) for key in new)
    if isinstance(new, list):
        return len(old) == len(new) and all(map(equal, old, new))
    return bool(old == new)


class Watches:
    """The watch of a model in each of its modes (training or not), made anew with every program."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.of_mode: dict[bool, ModelWatch] = {}
        self.counts: Counter[str] = Counter()
        self.ignored: set[str] = set()

    def renew(self) -> None:
        """The model is as it should be: a program was made of it."""
        self.of_mode[self.model.training] = ModelWatch(self.model, self.ignored)

    def clear(self) -> None:
        """There are no programs."""
        self.of_mode.clear()

    def must_renew(self, watch: ModelWatch) -> bool:
        """True if programs must be made anew, of a model that is not as it was; says why in the log."""
        found = watch.changes()
        name = type(self.model).__name__
        self.counts.update(found)
        for label in (label for label in found if self.counts[label] > PATIENCE):
            self.ignored.add(label)
            log.warning(
                "%s: %s changed %d times, and each time the programs were made anew; its changes are not seen any more. Pass what changes with every call as an input, "
                "or call `recompile()` after a change",
                name, label, self.counts[label],
            )  # fmt: skip
        if found:
            log.info("%s: the programs are made anew, because the model was changed: %s", name, ", ".join(found))
        else:
            self.renew()
        return bool(found)
