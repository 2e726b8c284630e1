"""From changes of layout at boundaries to the dict a class declares, and to the text a user pastes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from seqpar.errors import SeqparError
from seqpar.passes.derive import ITEM, Entry
from seqpar.sp_plan import SequenceParallelInput, SequenceParallelOutput, SequenceParallelPartialInput

STYLES = ("sp_plan", "cp_plan")
Key = tuple[str, str]  # path of a module, and "inputs" or "outputs"


class Unexpressible(SeqparError):
    """The form of a plan has no place for an entry. `module`, `change`: where no entry of this kind should be."""

    def __init__(self, text: str, module: str, change: str) -> None:
        super().__init__(text)
        self.module, self.change = module, change


def plan_of(model: nn.Module, entries: Sequence[Entry], style: str, outputs: Mapping[str, int]) -> dict[str, Any]:
    """The plan with these entries, those of equal blocks folded into `"blocks.*"`.

    Args:
        style: "sp_plan": types of `seqpar.sp_plan`; "cp_plan": those of diffusers.
        outputs: number of outputs of every module.

    Raises:
        Unexpressible: inputs and outputs of one path; some of several outputs or a part of a tensor that stays whole (cp_plan).
    """
    tables: dict[Key, dict[Any, Any]] = {}
    for entry in entries:
        place = entry.boundary
        table = tables.setdefault((place.module, "outputs" if entry.change == "gather" else "inputs"), {})
        key = (place.name, place.index)
        made = _entry(entry, style)
        if table.setdefault(key, made) != made:
            raise Unexpressible(f"{place} is split in another way each time the module is called", place.module, entry.change)
    whole = {key: _module_table(key, table, outputs, style) for key, table in tables.items()}
    return _joined(model, _folded(model, whole))


def _entry(entry: Entry, style: str) -> Any:
    """`entry` in the types of a style."""
    if style == "cp_plan":
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

        if entry.keep:
            raise Unexpressible(f"the first {entry.keep} positions of {entry.boundary} would stay whole", entry.boundary.module, entry.change)
        if entry.change == "gather":
            return ContextParallelOutput(gather_dim=entry.dim, expected_dims=entry.dims)
        return ContextParallelInput(split_dim=entry.dim, expected_dims=entry.dims, split_output=entry.boundary.kind == "output")
    if entry.change == "gather":
        return SequenceParallelOutput(gather_dim=entry.dim, expected_dims=entry.dims)
    on_output = entry.boundary.kind == "output"
    if entry.keep:
        return SequenceParallelPartialInput(entry.dim, entry.keep_like or entry.keep, expected_dims=entry.dims, split_output=on_output)
    return SequenceParallelInput(entry.dim, expected_dims=entry.dims, split_output=on_output)


def _module_table(key: Key, table: Mapping[Any, Any], outputs: Mapping[str, int], style: str) -> Any:
    """What one module declares: a dict of inputs, or its outputs (None: left as it is)."""
    module, kind = key
    if any(isinstance(name, int) and index is not None for name, index in table):
        raise Unexpressible(f"an output of {module or 'the model'} is a list of tensors", module, "gather" if kind == "outputs" else "split")
    if kind == "outputs":
        count = outputs.get(module, 1)
        found = [table.get((i, None)) for i in range(count)]
        if style == "cp_plan" and None in found:  # diffusers' hooks take no None
            raise Unexpressible(f"of the {count} outputs of {module}, only some are gathered: pass those through a submodule of their own (an nn.Identity will do)", module, "gather")
        return found[0] if count == 1 else found
    made: dict[Any, Any] = {}
    for (name, index), entry in sorted(table.items(), key=lambda item: (str(item[0][0]), item[0][1] or 0)):
        if index is None:
            made[name] = entry
        else:
            made.setdefault(name, []).append(entry)
    return made


def _folded(model: nn.Module, tables: Mapping[Key, Any]) -> dict[Key, Any]:
    """Entries that all items of a list share, under `"blocks.*"`."""
    found: dict[Key, Any] = {}
    done: dict[Key, set[Any]] = {}
    for (module, kind), table in tables.items():
        item = ITEM.search(module)
        items = _items(model, module, item) if item else []
        for name, entry in table.items() if isinstance(table, dict) else [(None, table)]:
            others = [tables.get((path, kind)) for path in items]
            alike = len(items) > 1 and all((other.get(name) if isinstance(other, dict) else other) == entry for other in others)
            path = ITEM.sub("*", module, count=1) if alike else module
            if name is None:
                found[(path, kind)] = entry
            elif name not in done.setdefault((path, kind), set()):
                done[(path, kind)].add(name)
                found.setdefault((path, kind), {})[name] = entry
    return found


def _items(model: nn.Module, module: str, item: Any) -> list[str]:
    """The paths of the same module in all items of its list."""
    parent = module[: item.start()].removesuffix(".")
    container = model.get_submodule(parent)
    return [f"{parent}.{i}{module[item.end() :]}" for i in range(len(container))] if isinstance(container, nn.ModuleList) else []


def _joined(model: nn.Module, tables: Mapping[Key, Any]) -> dict[str, Any]:
    """One dict: a path has inputs or outputs. Outputs of blocks that have inputs as well are listed block by block."""
    plan: dict[str, Any] = {path: table for (path, kind), table in tables.items() if kind == "inputs"}
    for (path, kind), table in tables.items():
        if kind == "outputs":
            parent, star, rest = path.partition("*")
            blocks = len(model.get_submodule(parent.removesuffix("."))) if star and path in plan else 0  # type: ignore[arg-type]
            for name in [f"{parent}{i}{rest}" for i in range(blocks)] or [path]:
                if name in plan:
                    raise Unexpressible(f"{name or 'the model'} would have both inputs and outputs, and a path of a plan has one of them", name, "gather")
                plan[name] = table
    return plan


def format_plan(plan: Mapping[str, Any]) -> str:
    """A plan as Python source, to be pasted into the class."""
    kinds = sorted({type(entry).__name__ for entry in _leaves(plan.values()) if entry is not None})
    style = "_cp_plan" if any(kind.startswith("ContextParallel") for kind in kinds) else "_sp_plan"
    module = "diffusers.models._modeling_parallel" if style == "_cp_plan" else "seqpar.sp_plan"
    lines = [f"from {module} import {', '.join(kinds)}", "", f"{style} = {{"]
    for path, table in plan.items():
        if isinstance(table, Mapping):
            lines += [f"    {_quoted(path)}: {{", *(f"        {_quoted(key)}: {_call(entry)}," for key, entry in table.items()), "    },"]
        else:
            lines.append(f"    {_quoted(path)}: {_call(table)},")
    return "\n".join([*lines, "}"])


def _leaves(tables: Iterable[Any]) -> Iterable[Any]:
    for table in tables:
        if isinstance(table, Mapping):
            yield from _leaves(table.values())
        elif isinstance(table, list | tuple):
            yield from _leaves(table)
        else:
            yield table


def _quoted(key: str | int) -> str:
    return f'"{key}"' if isinstance(key, str) else str(key)


def _call(entry: Any) -> str:
    if isinstance(entry, list | tuple):
        return f"[{', '.join(map(_call, entry))}]"
    if entry is None:
        return "None"
    said = {name: getattr(entry, name) for name in type(entry).__dataclass_fields__}
    said = {name: value for name, value in said.items() if value is not None and value is not False}
    return f"{type(entry).__name__}({', '.join(f'{name}={_quoted(value)}' for name, value in said.items())})"
