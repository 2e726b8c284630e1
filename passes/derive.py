"""Find the smallest declared plan of a traced model: where its values are split and gathered at boundaries of modules.

Before: %m = seqpar.boundary(%h, "blocks.0 input hidden_states"); …; %o = seqpar.boundary(%y, "proj_out output 0")     (every boundary marked)
After:  [Entry(input 'hidden_states' of blocks.0, "split", dim 1), Entry(output 0 of proj_out, "gather", dim 1)]

The labels are solved again with changes allowed at marks only (`partitioner.declare`). If that is impossible, the fewest forbidden changes of the
same problem say which operator stands in the way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from seqpar.partitioner.candidates import heaviest_factor, origin
from seqpar.partitioner.cost import Machine, Prices
from seqpar.partitioner.declare import Declared, DeclareProblem, Mark, MeshRules
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.infer import BESIDE, Inference, infer
from seqpar.partitioner.labels import Labels
from seqpar.partitioner.lengths import Sizes
from seqpar.partitioner.marker import is_marker, pin_of
from seqpar.partitioner.solve import solve
from seqpar.passes.boundary import Boundary

DEAR = 1.25  # an entry that says less
ITEM = re.compile(r"(?<![^.])\d+(?![^.])")  # the index of a ModuleList in a path


@dataclass(frozen=True)
class Entry:
    """One change of layout at a boundary. change: "split" or "gather"; dim, dims: the dim, and how many the tensor has.

    keep: length of the part before, which stays whole (0: none); keep_like: a parameter of the module that has so many rows.
    """

    boundary: Boundary
    change: str
    dim: int
    dims: int
    keep: int = 0
    keep_like: str | None = None


@dataclass(frozen=True)
class Problem:
    """A traced model with every boundary marked. mesh: attentions that exchange what they are given; needed: those the compiler exchanged."""

    graph: Graph
    inference: Inference
    degrees: Degrees
    prices: Prices
    mesh: frozenset[Node]
    needed: frozenset[Node]
    rules: MeshRules


Allowed = Callable[[Boundary, str], bool]


def boundaries_of(graph: Graph) -> dict[Node, Boundary]:
    """The markers of a graph that name a boundary of a module."""
    found = {node: Boundary.from_key(pin_of(node).key) for node in graph.nodes if is_marker(node)}
    return {node: place for node, place in found.items() if place.kind in ("input", "output")}


def pose(
    graph: Graph, degrees: Degrees, rules: MeshRules, over_mesh: Callable[[Node], bool] | None = None, machine: Machine | None = None, begin: Sequence[tuple[str, int]] = ()
) -> Problem:
    """Read a marked graph, with new sequences beginning at `begin`. over_mesh: whether an attention exchanges what it is given (None: as the compiler does)."""
    inference = infer(graph, Sizes(), begin=begin)
    solution = solve(inference, degrees, machine, phases=False, split_keys=False)  # no plan of hooks says that
    heavy = [n for n in solution.labels.exchanged if _is_heaviest(inference, n)]
    mesh = frozenset(n for n, r in inference.relations.items() if r.attention is not None and (over_mesh(n) if over_mesh else n in solution.labels.exchanged))
    return Problem(graph, inference, degrees, solution.prices, mesh, frozenset(heavy), rules)


def _is_heaviest(inference: Inference, node: Node) -> bool:
    """Its queries have the sequence on which most attention is spent."""
    heaviest = max(weight for weight in inference.sequences.values() if weight != BESIDE)
    rows = inference.axes[node][0][-2]
    return any(inference.sequences[a] == heaviest for a in heaviest_factor(inference, rows))


def declare(problem: Problem, allowed: Allowed, strict: bool = True) -> Declared:
    """The labels a plan can express if it may change layouts where `allowed(boundary, change)`."""
    places = boundaries_of(problem.graph)
    alone = {node for node, place in places.items() if _chained(places, node, place)}
    siblings = Counter(folded_key(place) for node, place in places.items() if node not in alone)
    marks = {node: _mark(place, 1 if node in alone else siblings[folded_key(place)], allowed) for node, place in places.items()}
    return DeclareProblem(problem.inference, problem.degrees, problem.prices, marks, problem.mesh, problem.needed, problem.rules, strict).solve_declared()


def _chained(places: Mapping[Node, Boundary], node: Node, place: Boundary) -> bool:
    """A block reads what the block before it returned: a split there is one of its own, not one of equal ones."""
    before = places.get(node.args[0])  # type: ignore[arg-type]
    return place.kind == "input" and before is not None and before.kind == "output" and _list_of(place.module) == _list_of(before.module) != ""


def _list_of(module: str) -> str:
    """The list whose item a module is."""
    parent, _, item = module.rpartition(".")
    return parent if item.isdigit() else ""


def _mark(place: Boundary, siblings: int, allowed: Allowed) -> Mark:
    """Equal entries of n blocks become one; one that is named once goes before. The output of the model is left to it, where a module inside does as well."""
    split = DEAR if place.kind == "input" and siblings > 1 else 1.0
    inside = ITEM.search(place.module) is not None and not _list_of(place.module)  # gathered in every block, or in none
    gather = DEAR if place.module == "" else 1.0 / siblings if inside else 1.0
    return Mark(allowed(place, "split"), place.kind == "output" and allowed(place, "gather"), split / siblings, gather)


def folded_key(place: Boundary) -> tuple[object, ...]:
    """Equal for the same boundary of all items of a list of modules."""
    return ITEM.sub("*", place.module), place.kind, place.name, place.index


def entries(problem: Problem, labels: Labels) -> list[Entry]:
    """What changes at the marks, in the order of the graph."""
    found = []
    for node, place in boundaries_of(problem.graph).items():
        operand: Node = node.args[0]  # type: ignore[assignment]
        before, after = (_cut_dims(problem, labels, value) for value in (operand, node))
        for dim in range(len(problem.inference.axes[node][0])):
            if before.get(dim) and not after.get(dim):
                found.append(_entry(problem, place, "gather", operand, dim, before[dim]))
            elif after.get(dim) and not before.get(dim):
                found.append(_entry(problem, place, "split", node, dim, after[dim]))
    return found


def told_apart(problem: Problem, found: Sequence[Entry]) -> Entry | None:
    """The first change that one call of a module needs and another does not; a plan speaks of all of them. A call with another number of dims is left out by `expected_dims`."""
    calls = Counter((replace(place, call=0), len(problem.inference.axes[node][0])) for node, place in boundaries_of(problem.graph).items())
    said = Counter((replace(e.boundary, call=0), e.change, e.dim, e.dims) for e in found)
    return next((e for e in found if said[replace(e.boundary, call=0), e.change, e.dim, e.dims] != calls[replace(e.boundary, call=0), e.dims]), None)


def _cut_dims(problem: Problem, labels: Labels, node: Node) -> dict[int, frozenset[int]]:
    """The sharded atoms of every dim."""
    table = problem.inference.table
    axes = problem.inference.axes[node][0]
    return {d: frozenset(a for a in table.roots(axis) if (origin(node), d, a) in labels.sharded) for d, axis in enumerate(axes)}


def _entry(problem: Problem, place: Boundary, change: str, value: Node, dim: int, cut: frozenset[int]) -> Entry:
    table = problem.inference.table
    axis = table.expand_axis(problem.inference.axes[value][0][dim])
    whole = [a for a in axis[0] if a not in cut]
    keep = sum(table.sizes.hint(table.length(a)) for a in whole)
    return Entry(place, change, dim, len(problem.inference.axes[value][0]), keep, _parameter_of_length(problem, place.module, whole))


def _parameter_of_length(problem: Problem, module: str, part: list[int]) -> str | None:
    """A tensor the module is given whose rows are that part of a sequence: hooks know nothing else by name, and take its dim 0."""
    table = problem.inference.table
    for node, place in boundaries_of(problem.graph).items():
        axes = problem.inference.axes[node][0]
        if part and place.module == module and place.kind == "input" and place.index is None and 0 < len(axes) < 3 and table.expand_axis(axes[0]) == (tuple(part),):
            return str(place.name)
    return None


def tables(problem: Problem) -> frozenset[Boundary]:
    """Boundaries of values that no input changes (positions, frequencies): nobody reads their sizes."""
    return frozenset(place for node, place in boundaries_of(problem.graph).items() if node not in problem.inference.input_dependent)


def beginnings(problem: Problem, block_list: str) -> list[tuple[str, int]]:
    """Dims at which a list of modules (its path) can be entered and left as one sequence: marks whose dim consists of several parts, on values from outside
    at the inputs of its items, and at the outputs of the last item."""
    places = boundaries_of(problem.graph)
    own = {node: place for node, place in places.items() if re.fullmatch(re.escape(block_list) + r"\.\d+", place.module)}
    last = next((place.module for place in reversed(own.values()) if place.kind == "output"), None)
    outputs = {node for node, place in own.items() if place.kind == "output"}
    found = []
    for node, place in own.items():
        inside = place.kind == "input" and node.args[0] in outputs
        if inside or (place.kind == "output" and place.module != last):
            continue
        found += [(node.name, dim) for dim, axis in enumerate(problem.inference.axes[node][0]) if _composed(problem, axis)]
    return found


def inner_beginnings(problem: Problem, block_list: str) -> list[tuple[str, int]]:
    """The same for the modules inside the blocks, each entered and left by itself: for blocks that take their sequence apart."""
    inner = re.compile(re.escape(block_list) + r"\.\d+\.[^.]+")
    own = [node for node, place in boundaries_of(problem.graph).items() if inner.fullmatch(place.module)]
    return [(node.name, dim) for node in own for dim, axis in enumerate(problem.inference.axes[node][0]) if _composed(problem, axis)]


def _composed(problem: Problem, axis: object) -> bool:
    factors = problem.inference.table.expand_axis(axis)  # type: ignore[arg-type]
    return len([a for f in factors for a in f]) > 1 and any(a in problem.inference.sequences for f in factors for a in f)


def block_lists(problem: Problem) -> list[str]:
    """Paths of lists of modules whose items were called, those with the most marks first."""
    counts: Counter[str] = Counter()
    for node in problem.graph.nodes:
        for path in _stack(node):
            parent, _, item = path.rpartition(".")
            if item.isdigit() and not ITEM.search(parent):
                counts[parent] += 1
    return [path for path, _ in counts.most_common()]


def _stack(node: Node) -> Iterator[str]:
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        yield path
