"""Axis inference: read a graph once from top to bottom and give every dim of every value an axis.

If an attention's sequence proves to be a product (frames x rows x columns flattened by a view), the view is marked and the
graph is read again with that product as one new atom, so that it can be cut at any position and not only between frames.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterable, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.fx import Graph, Node

import seqpar.partitioner.rules  # noqa: F401  (fills the registry)
from seqpar.partitioner.atoms import AtomTable, Axis
from seqpar.partitioner.cost import is_contraction, node_work
from seqpar.partitioner.lengths import Sizes
from seqpar.partitioner.op import Op, outputs_of, shape_of
from seqpar.partitioner.registry import registry
from seqpar.partitioner.relation import Relation
from seqpar.partitioner.repeats import Repeats, Run
from seqpar.partitioner.shortened import Shortened, Site
from seqpar.partitioner.written import find_written

Found = TypeVar("Found")
MAX_READINGS = 6
WRITES = (torch.ops.aten.slice_scatter.default, torch.ops.aten.select_scatter.default)
BESIDE = -1  # weight of a sequence that no attention knows: any that one knows goes before it
WORTH = 1e-3  # share of all work that one contraction must have to make its positions a sequence


@dataclass
class Inference:
    """Axes and relations of a graph. `sequences`: root atom -> weight (work of the attentions that query with it; `BESIDE` where none does).

    input_dependent: values that change with the inputs. All others (tables, positions) every rank has whole anyway; cut copies of them are free.
    repeats: blocks whose relations are those of another block, with their own operands; their axes are the same ones.
    written: if the graph has no attention node, softmaxes that weigh the rows of a product, or scores that do so without one: attention in a form of its own.
    """

    table: AtomTable
    axes: dict[Node, tuple[tuple[Axis, ...], ...]] = field(default_factory=dict)
    relations: dict[Node, Relation] = field(default_factory=dict)
    sequences: dict[int, int] = field(default_factory=dict)
    conflicts: list[tuple[Axis, Node, int]] = field(default_factory=list)
    merges: list[tuple[Node, int, Axis]] = field(default_factory=list)
    fused: bool = False
    input_dependent: frozenset[Node] = frozenset()
    written: dict[Node, Node] = field(default_factory=dict)
    shortened: Shortened = field(default_factory=Shortened, repr=False)
    repeats: Repeats = field(default_factory=Repeats, repr=False)
    answers: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)  # of `answer`

    def answer(self, key: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` says, asked once per key. For what follows from the graph alone and the key: the inference is complete and does not change any more."""
        if key not in self.answers:
            self.answers[key] = find()
        return self.answers[key]

    def axis(self, node: Node, dim: int) -> Axis:
        return self.table.expand_axis(self.axes[node][0][dim])

    @cached_property
    def shortens(self) -> bool:
        """Whether a stride shortens a dim over which the model works: not the pixels that a first convolution makes patches of."""
        asked = {root for ask in self.shortened.asks for root in self.table.expand((ask.atom,))}
        made = (relation.out_axes[0] for node, relation in self.relations.items() if is_contraction(node.target) and node in self.input_dependent)
        return bool(asked) and any(asked & self.table.roots(axis) for axes in made for axis in axes)

    @cached_property
    def attentions(self) -> tuple[Relation, ...]:
        """The relations of attention nodes, in order."""
        return tuple(relation for relation in self.relations.values() if relation.attention is not None)


def changing(graph: Graph) -> frozenset[Node]:
    """Values that change with the inputs."""
    found: set[Node] = set()
    for node in graph.nodes:
        if outputs_of(node) and (node.op == "placeholder" or any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return frozenset(found)


def infer(
    graph: Graph,
    sizes: Sizes,
    *,
    cut: int | None = None,
    batch: bool = False,
    fuse: bool = True,
    begin: Iterable[tuple[str, int]] = (),
    strides: bool = False,
    repeats: Repeats = Repeats(),  # noqa: B008
) -> Inference:
    """Axes for every value of a functional ATen graph whose nodes carry `meta["val"]`.

    cut: None makes a sequence that is a product one atom. A number makes that factor (0 frames, 1 rows) the one that can be cut, so that
    what the model does on the grid (convolutions) can stay sharded.
    batch: what attentions have in their batch counts as the sequence, instead of their rows. fuse: False leaves products as they are.
    begin: dims of markers (node name, dim) at which a new sequence begins, that has nothing to do with what it was made of.
    strides: whether dims that strides shorten are products from where they begin, so that both lengths are cut alike.
    repeats: blocks of which one is read, where that says all there is to say.
    """
    fused: dict[tuple[str, int], tuple[int, int]] = dict.fromkeys(begin, (0, 1))
    dependent, known = changing(graph), dict[Site, tuple[int, ...]]()
    for _ in range(MAX_READINGS):
        result = _read(graph, sizes, fused, cut or 0, batch, dependent, Shortened(known), repeats)
        marks = _products_to_fuse(result) if cut is None and fuse else {}
        answered = result.shortened.answered(result.table) if strides else known
        if not marks.keys() - fused.keys() and answered == known:
            break
        fused.update(marks)
        known = answered
    result.fused = bool(fused)
    _add_sequences_beside(result)
    if repeats and not repeated_alike(result):
        return infer(graph, sizes, cut=cut, batch=batch, fuse=fuse, begin=begin, strides=strides)
    return result


def _read(graph: Graph, sizes: Sizes, fused: dict[tuple[str, int], tuple[int, int]], cut: int, batch: bool, dependent: frozenset[Node], shortened: Shortened, repeats: Repeats) -> Inference:
    sizes.forget_conditions()
    result = Inference(AtomTable(sizes), input_dependent=dependent, shortened=shortened, repeats=repeats)
    for node in graph.nodes:
        if node in repeats.like:
            _read_like(node, repeats.like[node], result)
            continue
        outs = outputs_of(node)
        if node.op in ("placeholder", "get_attr") and outs:
            begin, table = shortened.begin, result.table
            result.axes[node] = tuple(tuple(begin(table, (node.name, i, d), n) for d, n in enumerate(shape_of(v))) for i, v in enumerate(outs))
        elif node.op == "call_function":
            if node.target is operator.getitem and node.args[0] in result.axes:
                _read_getitem(node, result)
            elif outs:
                _read_call(node, result, fused)
    for run in repeats.runs:
        for weights in run.weights[2:]:
            result.axes |= {node: result.axes[first] for node, first in zip(weights, run.weights[1], strict=True)}
    if batch:
        _collect_batches(result)
    else:
        _collect_sequences(result, cut)
    if not any(r.attention is not None for r in result.relations.values()):
        _collect_written(result, cut)
    return result


def _collect_written(result: Inference, cut: int) -> None:
    """Attention that is no scaled dot product (capped scores, a sigmoid, linear attention): its rows can be divided, with whole keys or a sum of states."""
    for found in find_written(result):
        if found.rows_of is not None:
            result.written.update([found.rows_of])
        _add_sequence(result, found.positions, cut, found.weight)


def _collect_batches(result: Inference) -> None:
    """Heads are no batch: they are the dim before the rows, if there are four dims."""
    for relation in result.relations.values():
        if relation.attention is not None:
            axes = relation.out_axes[0]
            for atom in (a for axis in axes[: max(1, len(axes) - 3)] for a in result.table.roots(axis)):
                result.sequences[atom] = result.table.sizes.hint(result.table.length(atom))


def _read_like(node: Node, first: Node, result: Inference) -> None:
    """A node of a copied block. Weights may be noted before those of the block that is read: what their axes are is found out later."""
    relation = result.relations.get(first)
    if relation is not None:
        own = dict(zip(first.all_input_nodes, node.all_input_nodes, strict=True))
        result.relations[node] = replace(relation, operands=tuple(own[n] for n in relation.operands))
    if outputs_of(node):
        result.axes[node] = result.axes.get(first, ())


def repeated_alike(result: Inference) -> bool:
    """Whether every copy begins as the block that was read for it did: then reading it would say the same, with its own weights in the place of others."""
    repeats, dependent = result.repeats, result.input_dependent
    same = all((node in dependent) == (first in dependent) for node, first in repeats.like.items())
    counted = result.attentions or not result.sequences.keys() & _own_roots(result)
    return same and bool(counted) and all(_begin_alike(result, run) for run in repeats.runs)


def _begin_alike(result: Inference, run: Run) -> bool:
    """Blocks 1 and 2 read equal sequences, and dims of equal length in the place of others."""
    table, sequences = result.table, result.sequences
    renamed = {root: root for node in run.shared for axes in result.axes.get(node, ()) for axis in axes for root in table.roots(axis)}
    for node, following in run.carried:
        before, after = (tuple(table.expand_axis(axis) for axes in result.axes.get(n, ()) for axis in axes) for n in (node, following))
        if [list(map(len, axis)) for axis in before] != [list(map(len, axis)) for axis in after]:
            return False
        for a, b in zip((a for axis in before for f in axis for a in f), (b for axis in after for f in axis for b in f), strict=True):
            if renamed.setdefault(a, b) != b or table.length(a) != table.length(b) or (a != b and (a in sequences or b in sequences)):
                return False
    return len(set(renamed.values())) == len(renamed)


def _own_roots(result: Inference) -> set[int]:
    """Atoms that every block has of its own (points that it learned, keys that it is given): in copies they stand for others."""

    def roots(nodes: Iterable[Node]) -> set[int]:
        return {root for n in nodes for axes in result.axes.get(n, ()) for axis in axes for root in result.table.roots(axis)}

    return {root for run in result.repeats.runs for root in roots(run.blocks[1]) - roots(run.blocks[0]) - roots(run.shared)}


def _read_getitem(node: Node, result: Inference) -> None:
    source: Node = node.args[0]  # type: ignore[assignment]
    tensors = [i for i, v in enumerate(source.meta["val"]) if hasattr(v, "shape")]
    result.axes[node] = (result.axes[source][tensors.index(node.args[1])],)  # type: ignore[arg-type]


def _read_call(node: Node, result: Inference, fused: dict[tuple[str, int], tuple[int, int]]) -> None:
    op = Op(node, result.table, result.axes, fused, result.shortened)
    op.fixed = node not in result.input_dependent
    apply_rule = node.meta.get("rule") or registry.find(node.target)
    if node.target in WRITES and op.fixed:
        op.reason = "a table that is written piece by piece"  # a loop that fills a mask must not cut the sequence at every row
    elif apply_rule is None:
        op.seen = False
        op.reason = "no rule for this operator"
    else:
        apply_rule(op)
    relation = op.relation()
    result.relations[node] = relation
    result.axes[node] = relation.out_axes
    result.conflicts += [(axis, node, dim) for axis, dim in op.conflicts]
    result.merges += [(node, dim, axis) for dim, axis in op.merges]


def _collect_sequences(result: Inference, cut: int) -> None:
    length, own = result.table.example_length, _own_roots(result)
    for node, relation in result.relations.items():
        spec = relation.attention
        if spec is None:
            continue
        queries, keys = (relation.operand_axes[i][-2] for i in (spec.q, spec.k))
        others = own if node in result.repeats.like else frozenset()
        _add_sequence(result, queries, cut, math.prod(map(length, (*relation.out_axes[0][:-2], queries, keys))), others)
        _add_sequence(result, keys, cut, 0, others)


def _add_sequence(result: Inference, axis: Axis, cut: int, weight: int, others: Set[int] = frozenset()) -> None:
    """The factor of `axis` that is to be cut is a sequence, of this weight besides what it has; but that of `others` is not theirs. Strides are never cut."""
    inner = {root for atom in result.shortened.inner for root in result.table.expand((atom,))}
    factors = [factor for factor in result.table.expand_axis(axis) if not inner.issuperset(factor)]
    for atom in factors[min(cut, len(factors) - 1)] if factors else ():
        result.sequences[atom] = result.sequences.get(atom, 0) + (weight if atom not in others else 0)


def _add_sequences_beside(result: Inference) -> None:
    """Contractions without a sequence (an encoder of pictures, tokens that are permuted afterwards) can be divided too, along their longest dim."""
    sizes, table = result.table.sizes, result.table
    work = {n: node_work(n, sizes) for n in result.relations if is_contraction(n.target)}
    least = WORTH * sum(work.values())
    for node in sorted(work, key=lambda n: -work[n]):  # stable: of equal ones the first
        relation = result.relations[node]
        axes = {a for some in (*relation.operand_axes, *relation.out_axes) for axis in some for a in table.roots(axis)}
        if node not in result.input_dependent or work.get(node, 0) < least or axes & result.sequences.keys():
            continue
        inputs = [i for i, n in enumerate(relation.operands) if n in result.input_dependent]
        dims = {d for (i, _), outs in relation.flows.items() if i in inputs for d in outs} - relation.whole
        factors = [f for d in sorted(dims) for f in table.expand_axis(relation.out_axes[0][d])]
        if factors:
            longest = max(factors, key=lambda f: sizes.hint(table.factor_length(f)))
            result.sequences.update(dict.fromkeys(longest, BESIDE))


def _products_to_fuse(result: Inference) -> dict[tuple[str, int], tuple[int, int]]:
    """Merges (node, output dim) whose product is a whole attention sequence, or was refused against one atom of it."""
    table = result.table
    wanted: dict[Axis, None] = {}  # in the order found
    for relation in result.relations.values():
        if relation.attention is not None:
            for i in (relation.attention.q, relation.attention.k):
                axis = table.expand_axis(relation.operand_axes[i][-2])
                if len(axis) > 1:
                    wanted[axis] = None
    for axis, node, dim in result.conflicts:
        if (table.roots(result.axes[node][0][dim]) | table.roots(axis)) & result.sequences.keys():
            wanted[table.expand_axis(axis)] = None
    marks: dict[tuple[str, int], tuple[int, int]] = {}
    for node, dim, axis in result.merges:
        axis = table.expand_axis(axis)
        for run in wanted:
            starts = [s for s in range(len(axis) - len(run) + 1) if axis[s : s + len(run)] == run]
            if starts:
                marks[(node.name, dim)] = (starts[0], len(run))
    return marks
