"""Every pin is honoured, or refused with its reason: none is dropped on the way from the hooks to the labels.

Before: placed markers, the normalised graph, labels
After:  notes for `explain()`, or a PlanError
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, GraphModule, Node

from seqpar.errors import PlanError
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.marker import is_marker, pin_of
from seqpar.partitioner.pins import is_pin, kept_atoms, pinned_atoms
from seqpar.partitioner.solve import Solution
from seqpar.passes.boundary import Boundary
from seqpar.passes.contradictions import HookReading
from seqpar.passes.declared import Declaration, Declared, missing
from seqpar.passes.said import Said
from seqpar.passes.trace import Traced


def has_pins(traced: Traced) -> bool:
    """Something is declared, in a plan or in the model's own code."""
    return isinstance(traced.marks, Declared) or any(is_pin(node) for node in traced.gm.graph.nodes)


def check_plan(traced: Traced, gm: GraphModule, inference: Inference) -> tuple[str, ...]:
    """Notes on the entries of the plan. gm: the graph after normalising, which `inference` is about.

    Raises:
        PlanError: an entry contradicts the model or the graph, or its marker is gone.
    """
    declared = traced.marks if isinstance(traced.marks, Declared) else None
    notes: list[str] = []
    if declared is not None:
        errors, notes = missing(declared, [call.name for call in traced.opaque])
        if declared.problems or errors:
            raise PlanError("\n".join([*declared.problems, *errors]))
        notes += _unread(declared, traced.gm.graph)
    _none_gone(declared, traced.gm.graph, gm.graph)
    reading = HookReading(inference, declared)
    reading.run(gm.graph)
    return tuple(dict.fromkeys([*notes, *reading.notes]))


def _unread(declared: Declared, graph: Graph) -> list[str]:
    """Entries whose tensor no output depends on."""
    present = {pin_of(node).key for node in graph.nodes if is_marker(node)}
    return [f"{entry.where}: {place} is read by nothing in the program" for place, entry in _entries(declared) if place.key not in present]


def _entries(declared: Declared) -> Iterator[tuple[Boundary, Declaration]]:
    for key, place in declared.hits.items():
        yield place, declared.entries[key]


def _none_gone(declared: Declared | None, before: Graph, after: Graph) -> None:
    kept = {node.name for node in after.nodes if is_marker(node)}
    for node in before.nodes:
        if is_pin(node) and node.name not in kept:
            said = Said.of(node, declared)
            raise said.error(
                f"pins {said.tensor}, which lies inside an attention that is run as one operator",
                "no value of its own",
                "an entry for the inputs of the attention instead",
            )


def honoured(traced: Traced, inference: Inference, solution: Solution) -> tuple[str, ...]:
    """What became of each entry.

    Raises:
        PlanError: the labels do not say what a pin says.
    """
    declared = traced.marks if isinstance(traced.marks, Declared) else None
    lines: dict[str, int] = {}
    for node in inference.relations:
        if is_pin(node):
            for line in _outcome(node, Said.of(node, declared), inference, solution):
                lines[line] = lines.get(line, 0) + 1
    return tuple(line if n == 1 else f"{line} ({n} times)" for line, n in lines.items())


def _outcome(node: Node, said: Said, inference: Inference, solution: Solution) -> list[str]:
    table, ranks, pin = inference.table, solution.degrees.ranks, pin_of(node)
    if pin.gather is not None:
        if any(key[0] is node for key in solution.labels.sharded):
            raise PlanError(f"{said.where} gathers {said.tensor}, and the solver left it sharded: please report this")
        return [f"{said.where}: gathered in dim {pin.gather}"]
    if ranks == 1:
        return [f"{said.where}: one rank, nothing to split"]
    lengths = {a: table.sizes.hint(table.length(a)) for a in pinned_atoms(inference, node)}
    for atom, length in lengths.items():
        if length >= ranks and (node, pin.split, atom) not in solution.labels.sharded:
            raise PlanError(f"{said.where} splits {said.tensor}, and the solver left it whole: please report this")
    split = [n for n in lengths.values() if n >= ranks]
    parts = " + ".join(f"{n}/{ranks}" if n >= ranks else f"{n}" for n in lengths.values())
    text = [table.sizes.hint(table.length(a)) for a in kept_atoms(inference, node) or ()]
    kept = f", the first {sum(text)} whole" if text else ""
    lines = [
        f"{said.where}: split in dim {pin.split}, {parts} positions{kept}" if split else f"{said.where}: kept whole: {parts} positions, fewer than {ranks} ranks"
    ]
    if said.entry is not None and said.entry.auto_pad and any(n % ranks for n in split):
        lines.append(f"{said.where}: auto_pad: nothing is padded, the parts have unequal lengths instead")
    return lines
