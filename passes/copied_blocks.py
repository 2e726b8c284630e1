"""Write one of the blocks that are alike, and copy its nodes for those after it.

Before: block 2: %h = aten.linear(%x1, %w2); block 3: %h = aten.linear(%x2, %w3)         as traced
After:  block 2 is written node by node; what it reads of block 1 (in every layout), and its weights, are replaced in a copy of its nodes

Block 2 is the first whose operands come from a block like it (`partitioner/repeats.py`). A block is copied if its labels are those of block 2 and it reads only what has a counterpart: values of the
block before in layouts that are at hand there too, weights of its own, what blocks share. Otherwise it is written as if there were no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx import Graph, Node, map_arg

from seqpar.partitioner.labels import Labels
from seqpar.partitioner.layout import Layout
from seqpar.partitioner.repeats import Repeats, Run

if TYPE_CHECKING:
    from seqpar.passes.emit import Emitter

Place = tuple[int, Layout | None]  # of an emitted node: the how manyeth value of a block it holds, in which layout; None for what has none
TEMPLATE = 2  # the block that is copied


@dataclass(frozen=True)
class Template:
    """nodes: emitted for block 2, its weights among them where they are written beside their readers. before, weights, own: which of the values of block 1, of
    the weights and of block 2 itself an emitted node holds. needed: what the nodes read that was emitted before them.
    """

    nodes: tuple[Node, ...]
    before: Mapping[Node, Place]
    weights: Mapping[Node, Place]
    own: Mapping[Node, Place]
    needed: frozenset[Node]


class CopiedBlocks:
    """Asked by the emitter at every node."""

    def __init__(self, emitter: Emitter, repeats: Repeats) -> None:
        self.emitter = emitter
        self.begins = _begins(emitter.source, repeats)
        self.starts: dict[int, Node] = {}  # of blocks 1 and 2 of the run at hand: the last node emitted before
        self.template: Template | None = None
        self.written: set[Node] = set()
        self.labels = _by_node(emitter.view.labels) if repeats else {}

    def has(self, node: Node) -> bool:
        """Whether a node needs no more writing: its block is a copy."""
        if node in self.begins:
            run, index = self.begins[node]
            if index <= TEMPLATE:
                self.starts[index], self.template = next(iter(reversed(self.emitter.graph.nodes))), None
                return False
            if index == TEMPLATE + 1:
                self.template = self._template(run)
            if self.template is not None and self._decided_alike(run, index) and self._copy(self.template, run, index):
                self.written.update(run.blocks[index], run.weights[index])
        return node in self.written

    def _decided_alike(self, run: Run, index: int) -> bool:
        """Whether a block, and the one before it, have the labels that the copied one has, and differ between ranks where it does.

        Where the cut switches between axes, blocks that are alike may have others.
        """
        own, copied = ((*run.blocks[i - 1], *run.blocks[i]) for i in (index, TEMPLATE))
        diverging = self.emitter.diverging
        return all(self.labels.get(node) == self.labels.get(first) and (node in diverging) == (first in diverging) for node, first in zip(own, copied, strict=True))

    def _template(self, run: Run) -> Template | None:
        """None for a block that does what others do not, or reads what has no counterpart."""
        nodes, first = _after(self.starts[TEMPLATE]), set(_after(self.starts[TEMPLATE - 1]))
        before, weights, own = (self._places(values) for values in (run.blocks[TEMPLATE - 1], run.weights[TEMPLATE], run.blocks[TEMPLATE]))
        names = {n.name for n in (*run.blocks[TEMPLATE - 1], *run.weights[TEMPLATE], *run.blocks[TEMPLATE])}
        needed = {n for node in nodes for n in node.all_input_nodes}.difference(nodes)
        # Emitted for block 1, and no value of it in any layout; nor a size, or a value that blocks share.
        private = any(n in first and n not in before and "seqpar_source" in n.meta and _value_of(n) in (None, *names) for n in needed)
        strange = any(n not in weights if n.op == "get_attr" else "seqpar_source" not in n.meta or _value_of(n) not in (None, *names) for n in nodes)
        return None if private or strange else Template(tuple(nodes), before, weights, own, frozenset(needed))

    def _places(self, values: Sequence[Node]) -> dict[Node, Place]:
        found: dict[Node, Place] = {}
        for i, value in enumerate(values):
            found |= {emitted: (i, layout) for layout, emitted in self.emitter.values.get(value, {}).items()}
            if isinstance(other := self.emitter.others.get(value), Node):
                found[other] = (i, None)
        return found

    def _copy(self, template: Template, run: Run, index: int) -> bool:
        """Write block `index`; False if something it reads is not at hand."""
        before, weights = run.blocks[index - 1], run.weights[index]
        now = dict[Node, Node]()
        for places, values in ((template.before, before), (template.weights, weights)):
            for emitted in template.needed & places.keys():
                found = self._held(values[places[emitted][0]], places[emitted][1])
                if found is None:
                    return False
                now[emitted] = found
        fetched = {n: weights[template.weights[n][0]] for n in template.nodes if n.op == "get_attr"}
        if any(self._held(weight, template.weights[n][1]) is not None for n, weight in fetched.items()):
            return False
        like = dict(zip((n.name for n in _known(run, TEMPLATE)), _known(run, index), strict=True))
        for node in template.nodes:
            now[node] = self._copied(node, now) if node not in fetched else self.emitter.graph.node_copy(fetched[node])
            now[node].meta.update(_notes(node, like))
        for places, values in ((template.before, before), (template.weights, weights), (template.own, run.blocks[index])):
            self._hold(places, values, {node: now[node] for node in template.nodes})
        return True

    def _copied(self, node: Node, now: Mapping[Node, Node]) -> Node:
        def here(n: Node) -> Node:
            return now.get(n, n)

        assert callable(node.target)
        return self.emitter.graph.create_node("call_function", node.target, map_arg(node.args, here), map_arg(node.kwargs, here))

    def _held(self, value: Node, layout: Layout | None) -> Node | None:
        found = self.emitter.others.get(value) if layout is None else self.emitter.values.get(value, {}).get(layout)
        return found if isinstance(found, Node) else None

    def _hold(self, places: Mapping[Node, Place], values: Sequence[Node], copies: Mapping[Node, Node]) -> None:
        """What was emitted for block 2 holds something; so does its copy."""
        for emitted, (at, layout) in places.items():
            if emitted in copies and layout is None:
                self.emitter.others[values[at]] = copies[emitted]
            elif emitted in copies and layout is not None:
                self.emitter.values.setdefault(values[at], {})[layout] = copies[emitted]


def _begins(source: Graph, repeats: Repeats) -> dict[Node, tuple[Run, int]]:
    """The first node of every block from block 1 on: a call, or a weight that is fetched beside the calls."""
    order = {node: i for i, node in enumerate(source.nodes)} if repeats else {}
    found: dict[Node, tuple[Run, int]] = {}
    for run in repeats.runs:
        for i in range(1, len(run.blocks)):
            members = (run.blocks[i][0], *(n for n in run.weights[i] if order[n] > order[run.blocks[i - 1][-1]]))
            found[min(members, key=order.__getitem__)] = (run, i)
    return found


def _by_node(labels: Labels) -> dict[Node, set[object]]:
    """All that is decided about every node."""
    found: dict[Node, set[object]] = {}
    for node, dim, atom in labels.sharded:
        found.setdefault(node, set()).add((dim, atom))
    for kind, nodes in (("exchanged", labels.exchanged), ("split", labels.split)):
        for node in nodes:
            found.setdefault(node, set()).add(kind)
    return found


def _after(node: Node) -> list[Node]:
    """What was emitted after a node."""
    found = []
    while (node := node.next).op != "root":
        found.append(node)
    return found


def _known(run: Run, index: int) -> Sequence[Node]:
    return (*run.blocks[index - 1], *run.weights[index], *run.blocks[index])


def _value_of(node: Node) -> str | None:
    """The name of the value that an emitted node holds for all readers."""
    held = node.meta.get("seqpar_layout")
    return None if held is None else str(held[0])


def _notes(node: Node, like: Mapping[str, Node]) -> dict[str, Any]:
    """The notes of a copied node, about its own source."""
    found = dict(node.meta)
    if "seqpar_source" in found:
        source = like[found["seqpar_source"]]
        found.update({"seqpar_source": source.name}, **{key: source.meta[key] for key in ("stack_trace", "nn_module_stack", "val") if key in found})
    for key in ("seqpar_value", "seqpar_layout"):
        if key in found:
            found[key] = (like[found[key][0]].name, found[key][1])
    return found if node.op == "call_function" else {key: found[key] for key in ("seqpar_layout",) if key in found}
