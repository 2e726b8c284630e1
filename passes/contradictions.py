"""What a declared plan would mean under hooks, and whether the graph agrees.

Hooks split a tensor at one boundary and gather it at another; in between, every operator works on the parts alone, and attention exchanges them.
Read so, a plan is followed through the graph with the inferred axes: per (value, dim, atom) split or whole. Seqpar would compute the
right result anyway; a plan that hooks would turn into a wrong one does not say what its author means, and is refused.

    %cos [S, D] whole, %q [B, H, S, D] split by plan["blocks.0"]["hidden_states"]      aten.mul(%q, %cos): error, `cos` is left whole
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from seqpar.errors import PlanError
from seqpar.partitioner.infer import BESIDE, Inference
from seqpar.partitioner.marker import Pin, is_marker, pin_of
from seqpar.partitioner.pins import kept_atoms, pinned_atoms
from seqpar.partitioner.relation import Relation
from seqpar.passes.declared import Declared
from seqpar.passes.localise import one_line
from seqpar.passes.said import Maker, Said, axes_text, gather_form, module_path, prefixes

aten = torch.ops.aten
FILLS = ("full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty", "scalar_tensor")
LOOSE = "either"  # a constant made for any size, or a value behind an operator that cannot be followed

State = dict[tuple[int, int], Any]  # (dim, atom) -> the marker that split it, or LOOSE; absent: whole


@dataclass
class HookReading:
    """Follows a plan through a graph.

    Raises (from `run`):
        PlanError: the plan contradicts the graph.
    """

    inference: Inference
    declared: Declared | None = None
    states: dict[Node, State] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self, graph: Graph) -> None:
        """Read the graph from top to bottom."""
        for node in graph.nodes:
            if is_marker(node):
                self.states[node] = self._marker(node, pin_of(node))
            elif node in self.inference.relations:
                self.states[node] = self._call(node, self.inference.relations[node])
            elif node.target is operator.getitem and node in self.inference.axes:
                held = {(d, a) for d, axis in enumerate(self.inference.axes[node][0]) for a in self._roots(axis)}
                self.states[node] = {key: by for key, by in self._state(node.args[0]).items() if key in held}
            elif node.op == "output":
                for value in node.all_input_nodes:
                    self._returned(value)

    # -- markers ----------------------------------------------------------------------------------------
    def _marker(self, node: Node, pin: Pin) -> State:
        state = self._state(node.args[0])
        said = Said.of(node, self.declared)
        if not pin.pinned:
            self._unexpected_dims(node, said)
            return state
        if pin.split is not None:
            return self._split(node, pin.split, state, said)
        return self._gather(node, pin.gather, state, said)  # type: ignore[arg-type]

    def _unexpected_dims(self, node: Node, said: Said) -> None:
        """An entry for tensors with another number of dims."""
        if self.declared is None or said.entry is None or pin_of(node).key not in self.declared.ignored:
            return
        known = {a for a, weight in self.inference.sequences.items() if weight != BESIDE}
        dims = [d for d, axis in enumerate(self.inference.axes[node][0]) if self._roots(axis) & known]
        what = f"expected_dims={said.entry.expected_dims}, but {said.tensor} has {node.meta['val'].dim()} dims"
        if dims:
            raise said.error(what, f"{self._text(node)}", f"{said.form(dims[0], node.meta['val'].dim())}")
        self.notes.append(f"{said.where}: nothing to {said.entry.verb}: {what}, none of them the sequence")

    def _split(self, node: Node, dim: int, state: State, said: Said) -> State:
        value = node.meta["val"]
        if not self._sequence(node, dim):
            dims = [d for d in range(value.dim()) if self._sequence(node, d)]
            write = said.form(dims[0], value.dim()) if dims else "nothing: remove the entry, or split what holds the sequence"
            raise said.error(f"splits dim {dim} of {said.tensor}, which is not the sequence", self._text(node), write)
        before = {by for by in state.values() if by is not LOOSE}
        if before:
            first = Said.of(before.pop(), self.declared)
            both = "one of the two entries" if first.where != said.where else f"an entry for {first.place.module} alone"
            raise said.error(
                f"splits dim {dim} of {said.tensor}, which {first.where} has split already, at {first.tensor}",
                self._text(node),
                f"{both}, or a gather between them; the first is at {first.source}",
            )
        if kept_atoms(self.inference, node) is None:
            write = "the length of the text, where the sequence has a boundary"
            raise said.error(
                f"keeps the first {pin_of(node).keep} positions of dim {dim} of {said.tensor} whole, and none of its parts ends there", self._text(node), write
            )
        return {**state, **{(dim, atom): node for atom in pinned_atoms(self.inference, node)}}

    def _gather(self, node: Node, dim: int, state: State, said: Said) -> State:
        if not any(d == dim for d, _ in state):
            value = node.meta["val"]
            others = [d for (d, _), by in state.items() if by is not LOOSE]
            if others:
                raise said.error(f"gathers dim {dim} of {said.tensor}, which is split in dim {others[0]}", self._text(node), said.form(others[0], value.dim()))
            dims = [d for d in range(value.dim()) if self._sequence(node, d)]
            split = f"an entry that splits it before (its sequence is dim {dims[0]}), or no gather here" if dims else "no gather here"
            raise said.error(f"gathers dim {dim} of {said.tensor}, which nothing has split", self._text(node), split)
        return {key: by for key, by in state.items() if key[0] != dim}

    # -- operators --------------------------------------------------------------------------------------
    def _call(self, node: Node, relation: Relation) -> State:
        loose = not relation.seen
        for i, operand in enumerate(relation.operands):
            if i not in relation.free:
                for (dim, atom), by in self._state(operand).items():
                    if by is not LOOSE and not self._passes(relation, i, dim, atom, by):
                        loose = loose or self._unclear(node, relation, i)
                        if not loose:
                            self._needed_whole(node, relation, i, dim, by)
        if relation.attention is not None:
            self._attention(node, relation)
        if loose or self._fills(node, relation):
            return {(d, a): LOOSE for axes in relation.out_axes for d, axis in enumerate(axes) for a in self._roots(axis)}
        return self._flow(node, relation)

    def _passes(self, relation: Relation, i: int, dim: int, atom: int, by: Node) -> bool:
        """The operator may work on parts: a split stays together, or is left out as one."""
        spec = relation.attention
        if spec is not None and (i == spec.mask or dim == len(relation.operand_axes[i]) - 2):
            return True  # exchanged
        if (i, dim) not in relation.flows:
            return False
        together = {a for (d, a), other in self._state(relation.operands[i]).items() if d == dim and other is by}
        reached = False
        for axes in relation.out_axes:
            held = {a for d in relation.flows[(i, dim)] if d < len(axes) for a in self._roots(axes[d])} & together
            if held and held != together:
                return False
            reached = reached or bool(held)
        return reached or relation.dropping

    def _unclear(self, node: Node, relation: Relation, i: int) -> bool:
        """Why the operator needs a whole operand is not its meaning, but that its axes could not be matched."""
        twice = list(node.args).count(relation.operands[i]) > 1
        return bool(relation.whole) or twice or node in self.inference.written or node in self.inference.written.values()

    def _fills(self, node: Node, relation: Relation) -> bool:
        """A constant of any size: hooks would make it for the local one."""
        name = getattr(node.target, "overloadpacket", node.target)
        if all(i in relation.free for i in range(len(relation.operands))):
            return getattr(name, "__name__", "") in FILLS
        return False

    def _flow(self, node: Node, relation: Relation) -> State:
        state: State = {}
        for axes in relation.out_axes:
            for d, axis in enumerate(axes):
                for atom in self._roots(axis):
                    votes = [(i, dim, self._state(relation.operands[i]).get((dim, atom))) for i, dim in self._sources(relation, d, atom)]
                    by = next((v for _, _, v in votes if v is not None and v is not LOOSE), None)
                    whole = next(((i, dim) for i, dim, v in votes if v is None), None)
                    if by is not None and whole is not None:
                        self._left_whole(node, relation, *whole, atom, by)
                    if by is not None or (votes and whole is None):
                        state[(d, atom)] = by if by is not None else LOOSE
        return state

    def _sources(self, relation: Relation, d: int, atom: int) -> Iterator[tuple[int, int]]:
        """(operand, dim) whose positions become those of an atom in output dim `d`."""
        for (i, dim), outs in relation.flows.items():
            if i not in relation.free and d in outs and atom in self._roots(relation.operand_axes[i][dim]):
                yield i, dim

    def _attention(self, node: Node, relation: Relation) -> None:
        """Queries, keys and values over the same positions are split alike."""
        spec = relation.attention
        rows = {i: len(relation.operand_axes[i]) - 2 for i in (spec.q, spec.k, spec.v)}
        for a, b in ((spec.q, spec.k), (spec.k, spec.v)):
            for atom in self._roots(relation.operand_axes[a][rows[a]]) & self._roots(relation.operand_axes[b][rows[b]]):
                held = [(i, self._state(relation.operands[i]).get((rows[i], atom))) for i in (a, b)]
                whole = [i for i, by in held if by is None]
                split = [by for _, by in held if by is not None and by is not LOOSE]
                if whole and split:
                    self._left_whole(node, relation, whole[0], rows[whole[0]], atom, split[0])

    # -- errors -----------------------------------------------------------------------------------------
    def _left_whole(self, node: Node, relation: Relation, i: int, dim: int, atom: int, by: Node) -> None:
        made = self._maker(node, relation.operands[i], dim, atom)
        said = Said.of(by, self.declared)
        value = made.value.meta["val"]
        raise PlanError(
            f"{made.tensor} is left whole, while {said.where} splits {said.tensor} over the same {self.inference.table.length(atom)} positions; {node.target} needs both alike\n"
            f"  the graph says: {made.tensor} is {self._text(made.value)}\n"
            f"  where:          {one_line(node)}\n"
            f"  write:          {made.form(value.dim())}"
        )

    def _needed_whole(self, node: Node, relation: Relation, i: int, dim: int, by: Node) -> None:
        said, operand = Said.of(by, self.declared), relation.operands[i]
        doing = "combines its positions" if (i, dim) in relation.reduces else "takes a part of it or lays it out anew"
        raise PlanError(
            f"{said.where} splits {said.tensor}, and no gather follows before {node.target}, which {doing}\n"
            f"  the graph says: {self._text(operand)}, split in dim {dim}\n"
            f"  where:          {one_line(node)}\n"
            f"  write:          {gather_form(operand, dim)}"
        )

    def _returned(self, value: Node) -> None:
        for (dim, _), by in self._state(value).items():
            if by is not LOOSE:
                said = Said.of(by, self.declared)
                raise PlanError(
                    f"{said.where} splits {said.tensor}, and no gather follows: an output of the model stays split in dim {dim}\n"
                    f"  the graph says: {self._text(value)}\n"
                    f"  where:          {one_line(value)}\n"
                    f"  write:          {gather_form(value, dim)}"
                )

    def _maker(self, reader: Node, value: Node, dim: int, atom: int) -> Maker:
        """Where a value left whole comes from: the output of the module that made it, or an input of the model. It can be split there."""
        inside = module_path(reader)
        while True:
            path = module_path(value)
            outside = [p for p in prefixes(path) if not (inside == p or inside.startswith(f"{p}."))]
            one = len(self.inference.axis(value, dim)) == 1  # no hook can split one factor of a product
            if (outside and one) or value.op != "call_function":
                return Maker(value, outside[0] if outside else "", dim)
            relation = self.inference.relations.get(value)
            step = next(self._sources(relation, dim, atom), None) if relation is not None else None
            if step is None:
                if value.target is not operator.getitem:
                    return Maker(value, path, dim)
                value = value.args[0]  # type: ignore[assignment]
                continue
            value, dim = relation.operands[step[0]], step[1]  # type: ignore[union-attr]

    # -- reading ----------------------------------------------------------------------------------------
    def _state(self, node: Any) -> State:
        return self.states.get(node, {})

    def _roots(self, axis: Any) -> set[int]:
        return self.inference.table.roots(axis)

    def _sequence(self, node: Node, dim: int) -> set[int]:
        """Atoms of the sequence in a dim: what attention knows, else what was found to be one beside it."""
        sequences = self.inference.sequences
        known = {a for axis in self.inference.axes[node][0] for a in self._roots(axis) if sequences.get(a, BESIDE) != BESIDE}
        atoms = self._roots(self.inference.axes[node][0][dim]) & sequences.keys()
        return atoms & known if known else atoms

    def _text(self, node: Node) -> str:
        """`(2, 12 + 30, 16), its sequence is dim 1`."""
        return axes_text(self.inference, node, [d for d in range(len(self.inference.axes[node][0])) if self._sequence(node, d)])
