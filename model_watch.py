"""What decides a program besides inputs and weights, and may be changed on the model between two calls: plain attributes, containers, layers, hooks.

A call compares all of it, so it is kept as flat lists that Python compares in C: 20 ns a value, 4 ns what is empty.
"""

from __future__ import annotations

import itertools
import logging
import operator
import types
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from seqpar.compat import is_wrapper
from seqpar.passes.effects import SIMPLE, same
from seqpar.passes.labelled import PLAIN, is_labelled
from seqpar.passes.model_code import names_in_code
from seqpar.passes.state_digest import is_elsewhere, named_by
from seqpar.passes.warm import CONTAINERS, DEPTH, remember
from seqpar.passes.weight_parts import made_of_parts
from seqpar.runtime.opaque import run_opaque

log = logging.getLogger("seqpar.compile")

MISSING = object()
OF_ANY_MODULE = vars(nn.Module()).keys() - {"training"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
NOT_OF_A_CALL = ("__init__", "__setstate__", "__repr__", "extra_repr", "reset_parameters", "_reset_parameters")
PATIENCE = 8  # programs made for changes of one place, before a warning says so
CLASS = types.MappingProxyType  # what vars() of a class is
LIKE_OTHERS = (*SIMPLE, *CONTAINERS, tuple, torch.Tensor)  # an attribute that was not there decides something; an object is what a library keeps there (diffusers' registry of hooks)


class Entry(NamedTuple):
    """An entry of a dictionary as it was. label: where in the model."""

    owner: Mapping[str, Any]
    key: str
    before: Any
    label: str


class Content(NamedTuple):
    """A container and a copy of it as it was. weights: what its tensors hold does not count."""

    container: Any
    copy: Any
    label: str
    weights: bool = False


class Attributes(NamedTuple):
    """The attributes of a module, which of them there were, and which a call may read."""

    owner: dict[str, Any]
    known: frozenset[str]
    read: frozenset[str]
    path: str


class ModelWatch:
    """A model's Python state as it is now: attributes, and those of its classes, as far as its code names them; containers and objects in them; layers; hooks.

    Of weights and buffers only that they are there, whether they are quantised, and for classes that are not torch's their shapes: a program reads the content anew in each call. Not watched: global variables,
    what functions close over, attributes with computed names, objects without `__dict__`, the order of dictionaries.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.entries: list[Entry] = []
        self.of_classes: list[Entry] = []
        self.contents: list[Content] = []
        self.attributes: list[Attributes] = []
        self.empty: list[tuple[dict[Any, Any], str]] = []
        self.seen: set[int] = set()
        read = names_read(model)
        for path, module in model.named_modules():
            self._watch(module, path, read[type(module)])
        for part in dict.fromkeys(part for kind in read for part in kind.__mro__ if not is_elsewhere(part.__module__)):
            self._watch_class(part, read)
        self.quantised = [(kept.names, kept.name, kept.path, form_of(kept.weight)) for kept in made_of_parts(model)]
        self._references = [weakref.ref(names[name]) for names, name, _, _ in self.quantised]
        for names, name, path, _ in self.quantised:
            self._contain(vars(names[name]), path)
        self._flatten()

    def _watch(self, module: nn.Module, path: str, read: frozenset[str]) -> None:
        own, title = vars(module), path or "the model"
        self.attributes.append(Attributes(own, frozenset(own), read, path))
        for name in sorted(own.keys() & read):
            self._enter(self.entries, own, name, joined(path, name))
        for part in (module._parameters, module._buffers):
            if not is_elsewhere(type(module).__module__):
                self._contain(part, f"parameters or buffers of {title}", weights=True)
            # None is a constant of the program, and what is there is read by it.
            self.entries += [Entry(part, name, None, joined(path, name)) for name, value in part.items() if value is None]
        self._contain(module._modules, f"the layers of {title}")
        for name in HOOKS:
            self._contain(own[name], f"the hooks of {title}")

    def _watch_class(self, kind: type, read: dict[type, frozenset[str]]) -> None:
        named = frozenset().union(*(names for owner, names in read.items() if issubclass(owner, kind)))
        for name in sorted(vars(kind).keys() & named):
            self._enter(self.of_classes, vars(kind), name, f"{kind.__qualname__}.{name}")

    def _enter(self, entries: list[Entry], owner: Mapping[str, Any], name: str, label: str) -> None:
        entries.append(Entry(owner, name, owner[name], label))
        self._contain(owner[name], label)

    def _contain(self, value: Any, label: str, weights: bool = False) -> None:
        if isinstance(value, dict) and not value:  # most are, and stay so
            self.empty.append((value, label))
            return
        found: list[tuple[Any, Any]] = []
        remember(value, found, self.seen, DEPTH)
        self.contents += (Content(container, copy, label, weights) for container, copy in found)

    def _flatten(self) -> None:
        """The same as lists to compare at once."""
        self._owners: list[Any]
        self._classes: list[Any]
        self._holders: list[Any]
        self._weights: list[Any]
        self._owners, self._keys, self._values = ([entry[i] for entry in self.entries] for i in range(3))
        self._classes, self._members, self._defaults = ([entry[i] for entry in self.of_classes] for i in range(3))
        self._containers, self._copies = ([content[i] for content in self.contents] for i in range(2))
        self._empty = [value for value, _ in self.empty]
        self._dictionaries = [attributes.owner for attributes in self.attributes]
        self._lengths = list(map(len, self._dictionaries))
        self._holders, self._weights = ([weight[i] for weight in self.quantised] for i in range(2))

    def changed(self) -> bool:
        """Whether anything is not as it was. Python compares by identity first, and only values that are not the same object by `==`."""
        try:
            return (
                any(self._empty)
                or list(map(dict.get, self._owners, self._keys)) != self._values
                or list(map(CLASS.get, self._classes, self._members)) != self._defaults
                or self._containers != self._copies
                or list(map(len, self._dictionaries)) != self._lengths
                or (bool(self._holders) and any(map(operator.is_not, map(dict.get, self._holders, self._weights), (reference() for reference in self._references))))
            )
        except Exception:  # tensors and arrays are not compared as a whole: they are other ones
            return True

    def changes(self) -> list[str]:
        """Where in the model something is not as it was. A tensor made anew with the same content is as it was, and an attribute that nobody reads does not count."""
        return list(dict.fromkeys(self._changes()))

    def _changes(self) -> Iterator[str]:
        yield from (entry.label for entry in (*self.entries, *self.of_classes) if not equal(entry.before, entry.owner.get(entry.key, MISSING)))
        yield from (content.label for content in self.contents if not equal_contents(content.copy, content.container, content.weights))
        yield from (label for value, label in self.empty if value)
        there = {(id(names), name) for names, name, _, _ in self.quantised}
        yield from (kept.path for kept in made_of_parts(self.model) if (id(kept.names), kept.name) not in there)
        yield from (path for names, name, path, form in self.quantised if not same_form(form, form_of(names.get(name))))
        for owner, known, read, path in self.attributes:
            yield from (joined(path, name) for name in sorted((owner.keys() - known) & read) if isinstance(owner[name], LIKE_OTHERS) or callable(owner[name]))


def form_of(weight: Any) -> list[Any]:
    """How a quantised weight is put together, without its numbers."""
    if is_wrapper(weight):
        names, context = weight.__tensor_flatten__()
        return [type(weight), context, *itertools.chain(*(form_of(getattr(weight, name)) for name in names))]
    return [type(weight), dict(vars(weight))] if is_labelled(weight) else [type(weight)]


def same_form(old: list[Any], new: list[Any]) -> bool:
    try:
        return bool(old == new)
    except Exception:  # tensors among the attributes, which are constants of a program
        return False


def names_read(model: nn.Module) -> dict[type, frozenset[str]]:
    """Class -> the attributes of its modules that a call of the model may read: names in all of the model's code, for layers of torch those in their own."""
    named = names_in_code(model)
    return {kind: frozenset({"forward", *(names_of(kind) if is_elsewhere(kind.__module__) else named)} - OF_ANY_MODULE) for kind in dict.fromkeys(map(type, model.modules()))}


def names_of(kind: type) -> set[str]:
    """Names in the methods of a class and of those it inherits from."""
    parts = [part for part in kind.__mro__ if part not in (nn.Module, object)]
    methods = [value for part in parts for name, value in vars(part).items() if isinstance(value, types.FunctionType) and name not in NOT_OF_A_CALL]
    return set().union(*(named_by(method.__code__)[0] for method in methods))


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def equal(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old is not new:
        return alike(old, new) and type(old) in PLAIN and not old.is_meta and torch.equal(old, new)
    return same(old, new)


def alike(old: torch.Tensor, new: torch.Tensor) -> bool:
    return old.shape == new.shape and old.dtype == new.dtype and old.device == new.device


def equal_contents(old: Any, new: Any, weights: bool) -> bool:
    if weights:
        return old.keys() == new.keys() and all(old[key] is new[key] or (old[key] is not None and new[key] is not None and alike(old[key], new[key])) for key in new)
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
        self.live = False  # a program runs modules of the model

    def renew(self, *programs: fx.Graph) -> None:
        """The model is as it should be; `programs` were made of it."""
        self.live |= any(node.target is run_opaque for program in programs for node in program.nodes)
        self.of_mode[self.model.training] = ModelWatch(self.model)

    def clear(self) -> None:
        """There are no programs."""
        self.of_mode.clear()

    def stale(self) -> ModelWatch | None:
        """The watch of this mode, if the model is not as it was when its programs were made."""
        watch = self.of_mode.get(self.model.training)
        return watch if watch is not None and watch.changed() else None

    def changes(self) -> list[str]:
        """Where the model is not as it was when its programs were made."""
        watch = self.stale()
        return [] if watch is None else watch.changes()

    def go_on(self) -> None:
        """What changed during a call, in modules that run as they are, is how they are now."""
        if self.stale() is not None:
            self.renew()

    def must_renew(self, watch: ModelWatch) -> bool:
        """True if programs must be made anew, of a model that is not as it was; says why in the log."""
        found = watch.changes()
        name = type(self.model).__name__
        self.counts.update(found)
        for label in (label for label in found if self.counts[label] == PATIENCE):
            log.warning("%s: %s was changed %d times, and each time the programs were made anew. Pass what changes from call to call as an input", name, label, PATIENCE)
        if found:
            log.info("%s: the programs are made anew, because the model was changed: %s", name, ", ".join(found))
        else:
            self.renew()
        return bool(found)
