"""Mark the tensors that cross module boundaries while a model is traced.

Before: %h = aten.linear(%x, %w); %n = aten.layer_norm(%h, …)                              # blocks.0(hidden_states=h)
After:  %h = aten.linear(%x, %w); %m = seqpar.boundary(%h, "blocks.0 input hidden_states …"); %n = aten.layer_norm(%m, …)

Hooks are on the modules while they are traced only (`Marks.active`), and run after the user's own. `detach` takes markers out again, and
says which value each named and who read it there.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from seqpar.compat import pytree
from seqpar.errors import UnsupportedError
from seqpar.partitioner.marker import boundary, is_marker, pin_of, unmarked
from seqpar.passes.share import with_graph

CALL = "call"  # kind of a boundary that is a call in the model's own code


@dataclass(frozen=True)
class Boundary:
    """A place where a tensor crosses into or out of a module.

    module: its path ("" is the model; of a module with several names the first). kind: "input" or "output". name: a parameter of its `forward`, or the
    index of an output. index: the place in a parameter or output that is a list. call: how often the module had been called before. source: `file.py:12` of its `forward`.
    """

    module: str
    kind: str
    name: str | int
    index: int | None = None
    call: int = 0
    source: str = ""

    @property
    def key(self) -> str:
        """As a text, for the marker."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_key(key: str) -> Boundary:
        return Boundary(**json.loads(key))

    def __str__(self) -> str:
        place = "" if self.index is None else f"[{self.index}]"
        what = f"input {self.name!r}" if self.kind == "input" else f"output {self.name}"
        return f"{what}{place} of {self.module or 'the model'}"


@dataclass(frozen=True)
class Mark:
    """What the marker at a boundary is to say (see `partitioner.marker.Pin`); with nothing given it only names the value."""

    split: int | None = None
    gather: int | None = None
    keep: Any = None


Choose = Callable[[Boundary, Tensor, Mapping[str, Any]], Mark | None]


class Marks:
    """Puts markers where `choose(boundary, tensor, arguments of the module's call)` returns a `Mark`.

    `placed` and `called` (modules) tell about the latest run of the model; torch.export makes several. `by_token`: modules that treat every token alone.
    """

    by_token: Collection[str] = ()

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.placed: list[Boundary] = []
        self.called: dict[str, int] = {}
        self._shared: list[tuple[Tensor, int, Boundary]] = []  # marked outputs whose storage is that of an input

    @contextmanager
    def active(self, model: torch.nn.Module) -> Iterator[None]:
        """Hooks on the model and its submodules; they do nothing unless torch.export runs the model."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                hooks = _ModuleHooks(self, name, module)
                stack.callback(module.register_forward_pre_hook(hooks.before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(hooks.after, with_kwargs=True).remove)
            yield

    def restart(self) -> None:
        """The model begins to run."""
        self.placed, self.called, self._shared = [], {}, []

    def finish(self) -> None:
        """The model has run.

        Raises:
            UnsupportedError: a marked output is an input of its module passed through, and was written to in place afterwards.
        """
        for tensor, version, place in self._shared:
            if tensor._version != version:
                raise UnsupportedError(
                    f"{place} is one of the module's inputs, and is written to in place later ({place.source}): it cannot be marked there. Return a copy of it"
                )
        self._shared.clear()

    def mark(self, place: Boundary, value: Any, arguments: Mapping[str, Any]) -> Any:
        """`value` with markers: a tensor, or a list or tuple of them."""
        if isinstance(value, list | tuple) and place.index is None:
            marked = [self.mark(Boundary(place.module, place.kind, place.name, i, place.call, place.source), x, arguments) for i, x in enumerate(value)]
            return value if all(a is b for a, b in zip(marked, value, strict=True)) else _like(value, marked)
        said = self.choose(place, value, arguments) if isinstance(value, Tensor) else None
        if said is None:
            return value
        self.placed.append(place)
        return boundary(value, place.key, said.split, said.gather, said.keep)

    def returned(self, place: Boundary, count: int) -> None:
        """A module returned `count` outputs."""

    def watch(self, tensor: Tensor, place: Boundary) -> None:
        """Notice a later write to a marked output."""
        self._shared.append((tensor, tensor._version, place))


class _ModuleHooks:
    """The two hooks of one module."""

    def __init__(self, marks: Marks, name: str, module: torch.nn.Module) -> None:
        self.marks, self.name = marks, name
        self.source = source_of(module)
        self.entered: list[list[tuple[Tensor, Tensor, int]]] = []  # per running call: (given, marked, its version)

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.compiler.is_exporting():
            return None
        if self.name == "":
            self.marks.restart()
            self.entered.clear()
        call = self.marks.called.get(self.name, 0)
        self.marks.called[self.name] = call + 1
        bound = bind(module, args, kwargs)
        place = Boundary(self.name, "input", "", call=call, source=self.source)
        changes = {name: self.marks.mark(_at(place, name), value, bound) for name, value in bound.items()}
        given, new = pytree.tree_leaves(bound), pytree.tree_leaves(changes)
        self.entered.append([(a, b, b._version) for a, b in zip(given, new, strict=True) if a is not b])
        return rebuilt(module, args, kwargs, bound, changes)

    def after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.compiler.is_exporting():
            return None
        for given, marked, version in self.entered.pop():
            if marked._version != version:  # the module writes to its input: the caller must see it
                given.copy_(marked)
        call = self.marks.called[self.name] - 1
        bound = bind(module, args, kwargs)
        place = Boundary(self.name, "output", 0, call=call, source=self.source)
        children, spec = pytree.tree_flatten(output, is_leaf=lambda x: x is not output)
        self.marks.returned(place, len(children))
        marked_children = [self.marks.mark(_at(place, i), child, bound) for i, child in enumerate(children)]
        self._watch(place, children, marked_children, pytree.tree_leaves((args, kwargs)))
        if self.name == "":
            self.marks.finish()
        return pytree.tree_unflatten(marked_children, spec)

    def _watch(self, place: Boundary, before: list[Any], after: list[Any], inputs: list[Any]) -> None:
        storages = {x.untyped_storage()._cdata for x in inputs if isinstance(x, Tensor)}
        for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
            if old is not new and old.untyped_storage()._cdata in storages:
                self.marks.watch(new, place)


def _at(place: Boundary, name: str | int) -> Boundary:
    return Boundary(place.module, place.kind, name, None, place.call, place.source)


def _like(value: Any, items: list[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def bind(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments given to a module's `forward` by name, those of `**kwargs` among them; what `*args` takes is a tuple. Defaults are left out."""
    signature = inspect.signature(module.forward)
    try:
        given = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:  # the call itself will say so
        return dict(kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in given:
            given |= given.pop(name)
    return given


def rebuilt(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], bound: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """(args, kwargs) with the changed arguments where they were given."""
    positional = list(args)
    names = list(inspect.signature(module.forward).parameters.values())
    new = dict(kwargs)
    for name, value in changes.items():
        if value is bound[name]:
            continue
        if name in kwargs:
            new[name] = value
            continue
        place = next(i for i, p in enumerate(names) if p.name == name)
        if names[place].kind is inspect.Parameter.VAR_POSITIONAL:
            positional[place:] = value
        else:
            positional[place] = value
    return tuple(positional), new


def source_of(module: torch.nn.Module) -> str:
    """`file.py:12` of the class's `forward`."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


# ---- taking them out again ------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """What a marker said, after it was taken out: the node whose value crosses, and the nodes that read it behind the boundary (by name)."""

    boundary: Boundary
    value: str
    readers: tuple[str, ...]


def markers(graph: fx.Graph) -> list[fx.Node]:
    """The markers of a graph, in order."""
    return [node for node in graph.nodes if is_marker(node)]


def detach(gm: fx.GraphModule, *, pins: bool = False) -> tuple[fx.GraphModule, tuple[Crossing, ...]]:
    """A program without markers that only name values (with `pins`: without any), and what they named.

    Before: %h = …; %m = seqpar.boundary(%h, key); %n = aten.layer_norm(%m)
    After:  %h = …; %n = aten.layer_norm(%h)              Crossing(key, value="h", readers=("n",))
    """
    gone = {node for node in markers(gm.graph) if pins or not pin_of(node).pinned}
    if not gone:
        return gm, ()
    crossings = tuple(Crossing(Boundary.from_key(pin_of(m).key), unmarked(m).name, tuple(_readers(m))) for m in markers(gm.graph) if m in gone)
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        env[node] = env[node.args[0]] if node in gone else graph.node_copy(node, env.__getitem__)
    graph.lint()
    return with_graph(gm, graph), crossings


def _readers(marker: fx.Node) -> Iterator[str]:
    for user in marker.users:
        if is_marker(user):
            yield from _readers(user)
        else:
            yield user.name


# ---- pins in the model's own code -----------------------------------------------------------------


def pinned_call(name: str, x: Tensor, *, split: int | None = None, gather: int | None = None) -> Tensor:
    """`x` behind a marker for a call `name(x, dim)` in the code that is traced."""
    return boundary(x, f'{{"module": "", "kind": "{CALL}", "name": "{name}"}}', split, gather)  # no json.dumps: Dynamo reads this
