"""Where the keys and values of an attention that does not use the mesh become whole: nowhere, at the attention, or further up, before they are computed; or that they do not."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from seqpar.partitioner.cost import is_contraction, nbytes
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.op import outputs_of
from seqpar.partitioner.relation import Relation
from seqpar.partitioner.split_keys import received_bytes

Source = tuple[Node, bool]  # a value that is gathered, and whether anything is computed from it (by a contraction) before it is a key or value
NOWHERE: frozenset[Source] = frozenset()


@dataclass(frozen=True)
class KeySource:
    """strategy: "local", "gather K/V", "gather input" or "split K/V"; values: what is gathered (split: and merged); received: its bytes per rank, for parts of equal sizes."""

    strategy: str
    values: frozenset[Node] = frozenset()
    received: float = 0.0

    @property
    def what(self) -> str:
        """In words."""
        if self.strategy == "split K/V":
            return "every rank attends the keys that it holds: gathers and merges the results"
        if not self.values:
            return "keys are whole on every rank: nothing moves"
        return "gathers keys and values" if self.strategy == "gather K/V" else "gathers the input of keys and values"


@dataclass
class KeySources:
    """Read off one solution; a walk over the graph, once. An attention, or a value in parts, is not looked through."""

    view: LayoutView
    _above: dict[Node, frozenset[Source]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node, relation in self.view.inference.relations.items():
            if relation.attention is None and not any(self.view.produced(node)) and outputs_of(node):
                found = frozenset().union(*(self._of(node, relation, i) for i in range(len(relation.operands))))
                self._above[node] = frozenset((n, True) for n, _ in found) if is_contraction(node.target) else found

    def _of(self, node: Node, relation: Relation, i: int) -> frozenset[Source]:
        operand = relation.operands[i]
        have, need = self.view.produced(operand), self.view.required(node, relation, i)
        if any(h - n for h, n in zip(have, need, strict=True)):
            return frozenset({(operand, False)})
        return NOWHERE if any(have) else self._above.get(operand, NOWHERE)

    def of(self, node: Node) -> KeySource:
        """For an attention that does not use the mesh."""
        relation = self.view.inference.relations[node]
        if node in self.view.labels.split:
            return KeySource("split K/V", frozenset({node}), received_bytes(self.view.inference, relation, self.view.ranks))
        spec = relation.attention
        found = self._of(node, relation, spec.k) | self._of(node, relation, spec.v)
        values = frozenset(n for n, _ in found)
        received = sum(sharded_bytes(self.view, n) for n in values) * (1 - 1 / self.view.ranks)
        return KeySource("local" if not found else "gather input" if all(computed for _, computed in found) else "gather K/V", values, received)


def sharded_bytes(view: LayoutView, node: Node) -> float:
    """Bytes of the positions of a value that are divided over the ranks."""
    table, total = view.inference.table, float(nbytes(outputs_of(node)[0], view.inference.table.sizes))
    for axis, cut in zip(view.inference.axes[node][0], view.produced(node), strict=True):
        factor = next((f for f in table.expand_axis(axis) if cut & set(f)), ())
        if factor:
            return total * sum(table.sizes.hint(table.length(a)) for a in factor if a in cut) / max(table.sizes.hint(table.factor_length(factor)), 1)
    return 0.0
