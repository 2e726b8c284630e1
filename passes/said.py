"""How errors and notes speak of a pin: which entry of the plan, which tensor, and what to write instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from seqpar.errors import PlanError
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.marker import pin_of
from seqpar.partitioner.op import outputs_of
from seqpar.passes.boundary import CALL, Boundary
from seqpar.passes.declared import Declaration, Declared
from seqpar.passes.localise import one_line


@dataclass(frozen=True)
class Said:
    """One pin. entry: of the plan; None for a call in the model's code."""

    place: Boundary
    entry: Declaration | None
    source: str

    @staticmethod
    def of(node: Node, declared: Declared | None) -> Said:
        """What a marker says."""
        place = Boundary.from_key(pin_of(node).key)
        entry = None
        if declared is not None:
            own = (place.module, place.kind, place.name)
            entry = declared.entries.get((*own, place.index)) or declared.entries.get((*own, 0 if place.index is None else None))
        return Said(place, entry, one_line(node) or place.source)

    @property
    def where(self) -> str:
        """How the user wrote it."""
        if self.entry is not None:
            return self.entry.where
        return f"{self.place.name} ({self.source})" if self.place.kind == CALL else str(self.place)

    @property
    def tensor(self) -> str:
        """The tensor it is about."""
        return "its tensor" if self.place.kind == CALL else str(self.place)

    def form(self, dim: int, dims: int) -> str:
        """The entry with another dim."""
        entry = self.entry
        if entry is None:
            return f"{self.place.name}(x, dim={dim})"
        if entry.gather:
            return f"SequenceParallelOutput(gather_dim={dim}, expected_dims={dims})"
        more = ", split_output=True" if entry.kind == "output" else ""
        if entry.text is not None:
            return f"SequenceParallelPartialInput(split_dim={dim}, text_len_source={entry.text!r}, expected_dims={dims}{more})"
        return f"SequenceParallelInput(split_dim={dim}, expected_dims={dims}{more})"

    def error(self, what: str, graph: str, write: str) -> PlanError:
        """A contradiction: the entry, what is wrong with it, what the graph says, where, what to write."""
        where = self.source if self.place.kind == CALL else f"{self.source} calls {self.place.module or 'the model'} ({self.place.source})"
        return PlanError(f"{self.where} {what}\n  the graph says: {graph}\n  where:          {where}\n  write:          {write}")


@dataclass(frozen=True)
class Maker:
    """Where a value comes from: module ("" for none) and node."""

    value: Node
    module: str
    dim: int

    @property
    def tensor(self) -> str:
        if self.module:
            return f"an output of {self.module}"
        return (
            f"input {self.value.target!r} of the model"
            if self.value.op == "placeholder"
            else f"the constant {self.value.target}"
            if self.value.op == "get_attr"
            else f"the value made at {one_line(self.value)}"
        )

    def form(self, dims: int) -> str:
        """The entry that splits it."""
        if self.module:
            return f"plan[{self.module!r}] = {{0: SequenceParallelInput(split_dim={self.dim}, expected_dims={dims}, split_output=True)}}  (0: its index among the outputs)"
        if self.value.op == "placeholder":
            return f"plan[''][{self.value.target!r}] = SequenceParallelInput(split_dim={self.dim}, expected_dims={dims})"
        return f"the entry of the module that makes it, with split_dim={self.dim}; a value made between modules is split by sp_shard(x, dim={self.dim}), or moved into a module"


def gather_form(value: Node, dim: int) -> str:
    """The entry that gathers a value."""
    module, dims = module_path(value), outputs_of(value)[0].dim()
    if module:
        return f"plan[{module!r}] = SequenceParallelOutput(gather_dim={dim}, expected_dims={dims})"
    return f"plan[''] = SequenceParallelOutput(gather_dim={dim}, expected_dims={dims}), or the same for the last module that holds the sequence in one dim"


def module_path(node: Node) -> str:
    """The innermost module whose `forward` made a value."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return stack[-1].partition("@")[0] if stack else ""


def prefixes(path: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def axes_text(inference: Inference, node: Node, sequence: Sequence[int]) -> str:
    """`(2, 12 + 30, 16), its sequence is dim 1`."""
    table = inference.table
    dims = []
    for d, axis in enumerate(inference.axes[node][0]):
        factors = [" + ".join(str(table.length(a)) for a in factor) for factor in table.expand_axis(axis)]
        dims.append("*".join(f if len(factors) == 1 or " " not in f else f"({f})" for f in factors) if d in sequence else str(outputs_of(node)[0].shape[d]))
    several = f"its sequences are dims {' and '.join(map(str, sequence))}"
    known = several if len(sequence) > 1 else f"its sequence is dim {sequence[0]}" if sequence else "none of its dims is a sequence"
    return f"({', '.join(dims)}), {known}"
