"""Why values have the layouts they have: the rule, the attention their axis came from, and the price of the opposite label."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from seqpar.errors import UnsupportedError
from seqpar.partitioner.alternatives import Forced, force, problem_of
from seqpar.partitioner.candidates import origin
from seqpar.partitioner.label_problem import LabelProblem
from seqpar.partitioner.op import outputs_of
from seqpar.passes.localise import one_line
from seqpar.passes.stages import stage_of
from seqpar.passes.text import amount, percent, short

if TYPE_CHECKING:
    from seqpar.passes.pipeline import Partitioned

MAX_ANSWERS = 6  # each solves the labels once more
SOURCE_LINE = re.compile(r"(?P<file>.+\.\w+):(?P<line>\d+)$")


@dataclass(frozen=True)
class Answer:
    """About one value, or `names` equal ones.

    module: path of the module that computes it; stage: the entry of a list of modules, or child of the model, around it. source: the line of its `forward`;
    inner: of the innermost function called from there, if any. layout: text form; sharded: whether any dim of it is. reasons: sentences. opposite_cost: what the whole program would cost more with the opposite label
    for the first of the values, in floating-point operations of one rank; None if there is no opposite (`reasons` says why), infinite if a rule
    or an attention forbids it.
    """

    names: tuple[str, ...]
    op: str
    stage: str
    source: str
    layout: str
    sharded: bool
    reasons: tuple[str, ...]
    opposite_cost: float | None
    module: str = ""
    inner: str = ""

    @property
    def where(self) -> str:
        """Module and source lines, as printed."""
        inner = f" > {os.path.basename(self.inner)}" if self.inner else ""
        return "  ".join(text for text in (self.module or self.stage, short(self.source) + inner) if text)

    def __str__(self) -> str:
        more = f" and {len(self.names) - 1} more like it" if len(self.names) > 1 else ""
        return "\n".join([f"{self.names[0]}{more}  {self.op}  {self.where}", f"  layout {self.layout}", *(f"  {reason}" for reason in self.reasons)])


@dataclass(frozen=True)
class Why:
    """`print` it; or read `answers`. more: how many kinds of values matched beyond those answered."""

    query: str
    answers: tuple[Answer, ...]
    more: int

    def __str__(self) -> str:
        rest = [f"… and {self.more} more kinds of values; ask for one by name"] if self.more else []
        return "\n".join([*map(str, self.answers), *rest])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"query": self.query, "answers": [asdict(a) for a in self.answers], "more": self.more}


def why(reader: Reader, query: str) -> Why:
    """Answers for all values that match, equal ones together; see `Plan.why`. Each value with a choice costs one more cut, and the first question of a reader its problem."""
    view = reader.view
    groups: dict[object, list[Node]] = {}
    for node in _matching(reader.partitioned, query):
        stage = re.sub(r"\d+", "*", stage_of(node))
        groups.setdefault((stage, str(node.target), one_line(node), view.text(node, view.produced(node))), []).append(node)
    chosen = list(groups.values())[:MAX_ANSWERS]
    return Why(query, tuple(map(reader.answer, chosen)), len(groups) - len(chosen))


# -- finding ---------------------------------------------------------------------------------------
def _matching(partitioned: Partitioned, query: str) -> list[Node]:
    values = [n for n in partitioned.inference.axes if outputs_of(n) and not isinstance(n.meta["val"], (tuple, list))]
    calls = [n for n in values if n.op != "get_attr"]
    named = [n for n in values if n.name == query]
    if not named and query.isidentifier():
        emitted = {n.name: n.meta["seqpar_source"] for n in partitioned.program(0).graph.nodes if "seqpar_source" in n.meta}
        named = [n for n in values if n.name == emitted.get(query)]
    if named and str(named[0].target).split(".")[-2:-1] == [query]:  # the first of a kind is called like its operator: all of them
        named += [n for n in values if n.target == named[0].target and n not in named]
    line = SOURCE_LINE.match(query)
    if named or line is not None:
        return named or _at_line(calls, line["file"], line["line"], query)  # type: ignore[index]
    plain = query.strip()
    for text in (lambda n: n.name, _module, lambda n: str(n.target), one_line):
        found = [n for n in calls if plain and plain in text(n)]
        if found:
            return found
    near = difflib.get_close_matches(plain, [n.name for n in calls], n=4, cutoff=0.5)
    hint = f"the nearest names are {', '.join(near)}" if near else "print_readable() shows all names"
    raise UnsupportedError(f"no value, module, operator or source line of this plan matches {query!r}; {hint}")


def _module(node: Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def _at_line(values: list[Node], file: str, line: str, query: str) -> list[Node]:
    """The values that this line computes: of a `forward`, or of a function that one calls."""
    places = [(n, *place.rpartition(":")[::2]) for n in values for place in (one_line(n), *n.meta.get("helper_lines", ()))]
    in_file = [(n, int(number)) for n, path, number in places if number.isdigit() and (path == file or path.endswith("/" + file.lstrip("./")))]
    found = [n for n, number in in_file if number == int(line)]
    if found:
        return found
    if not in_file:
        files = sorted({path.rpartition("/")[2] for _, path, number in places if number.isdigit()})
        raise UnsupportedError(f"no value of this plan comes from {query!r}; values come from {', '.join(files[:8])}")
    nearest = sorted({number for _, number in in_file}, key=lambda number: abs(number - int(line)))[:5]
    raise UnsupportedError(f"line {line} of {file} computes no value of this plan; the nearest lines that do: {', '.join(map(str, sorted(nearest)))}")


# -- answering -------------------------------------------------------------------------------------
class Reader:
    """Puts what the inference and the solver know about a value into sentences. Kept between questions: its label problem is built once."""

    def __init__(self, partitioned: Partitioned) -> None:
        self.partitioned = partitioned
        self.inference, self.solution, self.view = partitioned.inference, partitioned.solution, partitioned.view
        self.attention = {n: r for n, r in self.inference.relations.items() if r.attention is not None}

    @cached_property
    def problem(self) -> LabelProblem:
        """The labels to be chosen, with their prices."""
        return problem_of(self.inference, self.solution)

    def answer(self, nodes: list[Node]) -> Answer:
        node = nodes[0]
        layout = self.view.produced(node)
        forced = force(self.problem, self.solution, node) if self.view.ranks > 1 and node.op == "call_function" else None
        reasons = [*self._labels(node, forced), *self._axes(node), *self._rule(node)]
        cost = None if forced is None else forced.cost - self.solution.labels.cost
        target = str(node.target) if node.op == "call_function" else node.op
        names = tuple(n.name for n in nodes)
        module, inner = _module(origin(node)), node.meta.get("inner_line", "")
        return Answer(names, target, stage_of(origin(node)), one_line(node), self.view.text(node, layout), any(layout), tuple(reasons), cost, module, inner)

    def _labels(self, node: Node, forced: Forced | None) -> Iterable[str]:
        if forced is None:
            yield f"whole on every rank: {self._no_choice(node)}"
            return
        have, other = ("sharded", "whole") if forced.sharded else ("whole", "sharded")
        extra = forced.cost - self.solution.labels.cost
        yield f"{have}: producing it costs a rank {amount(forced.work_sharded)}FLOP sharded, {amount(forced.work_whole)}FLOP whole" + (
            f"; gathering it is priced {amount(forced.gather)}FLOP" if forced.gather else ""
        )
        if origin(node) in self.problem.beside:
            yield "it serves only the keys of attentions that attend where their queries are: a collective for those has to save more than others"
        if math.isinf(extra):
            yield f"it cannot be {other}: attention around a ring, or a reader that takes parts only, needs it {have}"
        else:
            share = percent(extra, self.solution.labels.cost)
            yield f"forced to be {other}, the program would cost {amount(extra)}FLOP more per rank ({share} of {amount(self.solution.labels.cost)}FLOP)"

    def _no_choice(self, node: Node) -> str:
        """Why the solver had no label to choose."""
        table, ranks = self.inference.table, self.view.ranks
        if ranks == 1:
            return "there is one rank"
        if node.op != "call_function":
            return "inputs and weights are given whole; readers take their part of them for nothing"
        problem = self.problem
        dim = problem.candidate(node)
        if dim is None:
            return "has no sequence dim"
        atoms = problem.atoms(origin(node), dim)
        if node not in self.inference.input_dependent:
            return "it does not depend on the inputs, so every rank has it anyway; readers take their part for nothing"
        if not any(map(problem.long_enough, atoms)):
            return f"its sequence ({', '.join(str(table.length(a)) for a in atoms)}) is shorter than {ranks} ranks"
        relation = self.inference.relations.get(origin(node))
        return relation.reason if relation is not None and relation.reason else f"the rule of {origin(node).target} can make dim {dim} only whole"

    def _axes(self, node: Node) -> Iterable[str]:
        """Which attention the sequence in each dim came from."""
        for dim, axis in enumerate(self.inference.axes[node][0]):
            atoms = self.inference.table.roots(axis) & self.inference.sequences.keys()
            if not atoms:
                continue
            found = [n for n, r in self.attention.items() if atoms & self._rows(n, r)]
            text = self.view.axis_text(axis, self.view.produced(node)[dim])
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                yield f"dim {dim}, {text}, is the sequence of {found[0].name} ({short(one_line(found[0]))}){more}"
            else:
                yield f"dim {dim}, {text}, is the longest dim of a contraction that no attention's sequence reaches"

    def _rows(self, node: Node, relation: Any) -> set[int]:
        return {a for i in (relation.attention.q, relation.attention.k) for a in self.inference.table.roots(relation.operand_axes[i][-2])}

    def _rule(self, node: Node) -> Iterable[str]:
        """What the operator's rule says, where it asks for whole dims."""
        relation = self.inference.relations.get(origin(node))
        if relation is None:
            return
        if relation.attention is not None:
            meshed = origin(node) in self.solution.labels.exchanged
            split = origin(node) in self.solution.labels.split
            yield "attention over the mesh" if meshed else "attention divided along its keys" if split else f"attention where its queries are: {self.solution.reasons.get(origin(node), 'nothing moves')}"
        elif not relation.seen:
            yield f"no rule for {origin(node).target}: it takes whole values and makes whole values"
        elif relation.reason:
            yield f"rule of {origin(node).target}: {relation.reason}"
        if relation.whole:
            yield f"its rule makes dim {', '.join(map(str, sorted(relation.whole)))} only whole"
