"""How an attention over the mesh is executed: everything that was decided about it, in one place for the emitter, the plan, predictions and the fingerprint."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch.fx import Node

from seqpar.partitioner.balance import in_zigzag
from seqpar.partitioner.division import Degrees, Division, division
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.solve import Solution
from seqpar.partitioner.turns import Turns, turns_of


@dataclass(frozen=True)
class Execution:
    """division: of heads and rows over the ranks; turns: in which heads are exchanged and attended; zigzag: whether a causal ring deals its rows out.

    Invariants: several turns have no ring, so no zigzag order, and no shared heads.
    """

    division: Division
    turns: Turns
    zigzag: bool

    def __post_init__(self) -> None:
        assert len(self.turns.heads) == 1 or not (self.zigzag or self.division.shared), f"turns of {self.name}"

    @property
    def name(self) -> str:
        """As plans call it: `ring (zigzag)`, `ulysses (in 4 turns)`."""
        turns = len(self.turns.heads)
        notes = ((" (zigzag)", self.zigzag), (" (shared heads)", self.division.shared), (f" (in {turns} turns)", turns > 1))
        return mesh_name(self.division.degrees) + "".join(note for note, said in notes if said)


def execution_of(inference: Inference, solution: Solution, node: Node) -> Execution:
    """Of an attention that uses the mesh; the same on every rank."""
    found = (inference, solution.degrees, solution.prices, node)
    return Execution(division(*found), turns_of(*found), in_zigzag(inference, solution, node))


def mesh_name(degrees: Degrees) -> str:
    """How plans call attention over this mesh."""
    return "+".join(name for name, degree in (("ulysses", degrees.ulysses), ("ring", degrees.ring)) if degree > 1)


def head_conditions(inference: Inference, solution: Solution) -> list[sympy.Basic]:
    """Heads are exchanged by number: where that is symbolic (frames, or heads and batch in one dim), it is the example's."""
    table = inference.table
    found: dict[sympy.Basic, None] = {}
    for node in solution.labels.exchanged:
        spec = inference.relations[node].attention
        if execution_of(inference, solution, node).division.degrees.ulysses == 1:
            continue
        for heads in (table.axis_length(inference.relations[node].operand_axes[i][1]) for i in (spec.q, spec.k, spec.v)):
            if not isinstance(heads, int):
                found[sympy.Eq(heads, table.sizes.hint(heads))] = None
    return list(found)
