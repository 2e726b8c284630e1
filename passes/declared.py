"""Declared plans: which tensor each entry means, and the markers that pin them while the model is traced.

Before: plan["blocks.0"]["hidden_states"] = split dim 1
After:  %m = seqpar.boundary(%h, "blocks.0 input hidden_states …", split=1); … = aten.layer_norm(%m, …)

What cannot be decided while the hooks run (is the dim the sequence?) is left to `contradictions.py`; what the hooks find wrong is kept in
`problems`, since an exception raised inside the tracer would lose its type.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.errors import PlanError
from seqpar.partitioner.marker import boundary
from seqpar.passes.boundary import Boundary, Marks, source_of


@dataclass(frozen=True)
class Declaration:
    """One entry of a plan.

    where: how the plan names it, `plan['rope'][0]`. path: the module as the plan names it, possibly with one `*`. name: a parameter, or the index of an
    output (None: the only output), or nothing for a module that treats tokens alone (kind "tokens"). index: the place in a list of entries. dim: split or gathered. text: positions that stay whole, a number or a parameter.
    """

    where: str
    path: str
    kind: str
    name: str | int
    index: int | None
    dim: int
    gather: bool = False
    expected_dims: int | None = None
    text: str | int | None = None
    auto_pad: bool = False
    count: int | None = None  # how many outputs the module must return, or tensors the list must have

    @property
    def verb(self) -> str:
        return "gather" if self.gather else "split"


Place = tuple[str, str, str | int, int | None]  # module, kind, name, index


class Declared(Marks):
    """Puts a marker on every tensor that a plan declares.

    Raises:
        PlanError: a module, a parameter of a `forward`, or an entry of a ModuleList does not exist; two entries mean the same tensor.
    """

    def __init__(self, model: torch.nn.Module, declarations: Iterable[Declaration]) -> None:
        super().__init__(lambda *_: None)
        self.entries: dict[Place, Declaration] = {}
        self.sources: dict[str, str] = {}
        self.names = {id(module): name for name, module in model.named_modules()}
        by_token: set[str] = set()
        for declaration in declarations:
            for module in find(model, declaration):
                if declaration.kind == "tokens":
                    by_token.add(self.names[id(module)])
                else:
                    self._declare(module, declaration)
        self.by_token = frozenset(by_token)
        self.restart()

    @contextmanager
    def active(self, model: torch.nn.Module) -> Iterator[None]:
        """No hooks for a plan without a tensor."""
        with super().active(model) if self.entries else nullcontext():
            yield

    def _declare(self, module: torch.nn.Module, declared: Declaration) -> None:
        name = self.names[id(module)]
        self.sources[name] = source_of(module)
        if declared.kind == "input":
            check_parameter(module, name, declared)
        place = (name, declared.kind, declared.name, declared.index)
        other = self.entries.get(place)
        if other is not None:
            what = "split twice" if not (other.gather or declared.gather) else f"to {other.verb} and to {declared.verb}"
            raise PlanError(f"{other.where} and {declared.where} declare the same tensor, {text(place)}, {what} ({self.sources[name]}). Keep one of them")
        self.entries[place] = declared

    def restart(self) -> None:
        super().restart()
        self.problems: list[str] = []
        self.ignored: dict[str, Declaration] = {}  # key of a marker that pins nothing: the number of dims is another than expected
        self.hits: dict[Place, Boundary] = {}
        self.root: Mapping[str, Any] = {}

    def returned(self, place: Boundary, count: int) -> None:
        """A list of gathers names every output."""
        for declared in [d for (module, kind, _, _), d in self.entries.items() if (module, kind) == (place.module, "output") and d.count not in (None, count)][
            :1
        ]:
            self.problems.append(
                f"{declared.where}: {place.module or 'the model'} returns {count} output{'s' * (count != 1)}, and the plan gathers {declared.count} ({place.source}). List one entry per output, None for one that is not gathered"
            )

    def finish(self) -> None:
        super().finish()
        self.root = {}  # holds tensors of the tracer

    def mark(self, place: Boundary, value: Any, arguments: Mapping[str, Any]) -> Any:
        """`value`, with markers on what the plan declares of it."""
        if place.module == "" and place.kind == "input":
            self.root = arguments
        own = (place.module, place.kind, place.name)
        indexed = {place_[3]: declared for place_, declared in self.entries.items() if place_[:3] == own}
        if not indexed or value is None:
            return value
        if None in indexed:
            return self._mark_one(place, value, indexed[None], arguments)
        if isinstance(value, Tensor):
            if len(indexed) == 1:
                return self._mark_one(place, value, indexed[0], arguments)
            return self._problem(place, value, indexed[0], f"is one tensor, and the plan lists {len(indexed)}")
        if not isinstance(value, list | tuple):
            return self._problem(place, value, indexed[0], f"is a {type(value).__name__}, not a list of tensors")
        if len(value) != len(indexed):
            return self._problem(place, value, indexed[0], f"is a list of {len(value)}, and the plan lists {len(indexed)}")
        items = [
            self._mark_one(Boundary(place.module, place.kind, place.name, i, place.call, place.source), x, indexed[i], arguments) for i, x in enumerate(value)
        ]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _mark_one(self, place: Boundary, value: Any, declared: Declaration, arguments: Mapping[str, Any]) -> Any:
        if value is None:
            return value
        if not isinstance(value, Tensor):
            hint = f"; it has {len(value)} entries: declare a list of as many" if isinstance(value, list | tuple) else ""
            return self._problem(place, value, declared, f"is a {type(value).__name__}, not a tensor{hint}")
        self.hits[(place.module, place.kind, place.name, declared.index)] = place
        if declared.expected_dims not in (None, value.dim()):
            self.ignored[place.key] = declared
            return self._put(place, value)
        if not -value.dim() <= declared.dim < value.dim():
            return self._problem(place, value, declared, f"has {value.dim()} dims {sizes(value)}: there is no dim {declared.dim}")
        if declared.gather:
            return self._put(place, value, gather=declared.dim)
        keep = None if declared.text is None else self._text_length(place, value, declared, arguments)
        return self._put(place, value, split=declared.dim, keep=keep)

    def _put(self, place: Boundary, value: Tensor, **said: Any) -> Tensor:
        self.placed.append(place)
        return boundary(value, place.key, **said)

    def _problem(self, place: Boundary, value: Any, declared: Declaration, what: str) -> Any:
        self.problems.append(f"{declared.where}: {place} {what} ({place.source})")
        return value

    def _text_length(self, place: Boundary, value: Tensor, declared: Declaration, arguments: Mapping[str, Any]) -> Any:
        """Positions at the front that stay whole: a number, or read from a parameter of the module or the model."""
        source: Any = declared.text
        if isinstance(source, str):
            if source not in arguments and source not in self.root:
                self._problem(place, value, declared, f"needs text_len_source={source!r}, which is given neither to the module nor to the model in this call")
                return None
            source = arguments[source] if source in arguments else self.root[source]
        if isinstance(source, Tensor) and source.dim():
            source = source.shape[0 if source.dim() < 3 else -2]  # [batch, text, channels]: a length is never the batch
        if isinstance(source, bool) or not isinstance(source, int | torch.SymInt):
            self._problem(
                place, value, declared, f"needs text_len_source={declared.text!r} to be an integer or a tensor of that length, not {describe(source)}"
            )
            return None
        if source > value.shape[declared.dim]:
            self._problem(
                place, value, declared, f"{sizes(value)} is shorter in dim {declared.dim} than its text, text_len_source={declared.text!r} = {source}"
            )
            return None
        return source


def find(model: torch.nn.Module, declared: Declaration) -> list[torch.nn.Module]:
    """The modules a path means: one, or with `*` those of a list.

    Raises:
        PlanError: there is no such module.
    """
    found = [("", model)]
    for part in declared.path.split(".") if declared.path else ():
        inner = []
        for path, module in found:
            children = {name: child for name, child in module._modules.items() if child is not None}
            if part == "*" and not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict | torch.nn.Sequential):
                raise PlanError(
                    f"{declared.where}: '*' stands for the entries of a ModuleList, and {path or 'the model'} is a {type(module).__name__}. Name its submodule: {listed(children)}"
                )
            if part != "*" and part not in children:
                raise PlanError(f"{declared.where}: {path or 'the model'} ({type(module).__name__}) has no submodule {part!r}. It has {listed(children)}")
            chosen = children.items() if part == "*" else [(part, children[part])]
            inner += [(f"{path}.{name}".strip("."), child) for name, child in chosen]
        found = inner
    return [module for _, module in found]


def check_parameter(module: torch.nn.Module, name: str, declared: Declaration) -> None:
    """Raise PlanError unless `forward` of the module takes the declared parameter."""
    parameters = inspect.signature(module.forward).parameters
    if declared.name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    raise PlanError(
        f"{declared.where}: forward of {name or 'the model'} ({type(module).__name__}, {source_of(module)}) has no parameter {declared.name!r}. It has {listed(parameters)}"
    )


def text(place: Place) -> str:
    return str(Boundary(*place))


def sizes(value: Tensor) -> str:
    return str([int(n) if isinstance(n, int) else str(n) for n in value.shape])


def describe(value: Any) -> str:
    return f"a tensor {sizes(value)}" if isinstance(value, Tensor) else "None" if value is None else f"a {type(value).__name__}"


def listed(names: Iterable[str], limit: int = 12) -> str:
    """`a, b, c`, or "none"."""
    names = list(names)
    more = f", … {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more or "none"


def missing(declared: Declared, opaque: Sequence[str]) -> tuple[list[str], list[str]]:
    """(errors, notes) about entries that met no tensor in the traced call.

    opaque: modules that run as they are, so that no tensor inside them can be pinned.
    """
    errors, notes = [], []
    for place, entry in declared.entries.items():
        module, kind, name, _ = place
        if place in declared.hits:
            continue
        inside = next((o for o in opaque if module == o or module.startswith(f"{o}.")), None)
        if inside is not None:
            errors.append(f"{entry.where}: {module} runs as it is, whole on every rank, because {inside} decides by activations: nothing in it can be pinned")
        elif module not in declared.called:
            notes.append(f"{entry.where}: {module} is not called with these inputs")
        elif kind == "input":
            notes.append(f"{entry.where}: {text(place)} is None or left out in this call")
        else:
            errors.append(f"{entry.where}: {module or 'the model'} returns fewer outputs: there is no output {name} ({declared.sources[module]})")
    return errors, notes
