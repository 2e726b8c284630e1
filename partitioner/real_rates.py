"""What prices take into account only at real rates: for hardware that the user named, strategies of attentions are compared by time.

With capped prices (`cost.Prices.real` is False) every answer here is the neutral one.
"""

from __future__ import annotations

from functools import cached_property

from torch.fx import Node

from seqpar.partitioner.candidates import heaviest_factor
from seqpar.partitioner.cost import Prices, attention_pairs, nbytes, node_work
from seqpar.partitioner.division import Degrees, Division
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.relation import Relation

MAIN = 0.05  # an attention with this share of the heaviest one's work is one the ranks were asked for
HIDDEN = 1e-3  # price of a byte that travels behind computation


class RealRates:
    """Asked by `LabelProblem` while it prices one mesh."""

    def __init__(self, inference: Inference, degrees: Degrees, prices: Prices) -> None:
        self.inference, self.degrees, self.prices = inference, degrees, prices
        self.sizes = inference.table.sizes

    @cached_property
    def main(self) -> dict[Node, int]:
        """Heavy attention nodes -> the longest sequence atom of their queries, which is divided at any price: the user asked for ranks."""
        if not self.prices.real:
            return {}
        table = self.inference.table
        work = {n: node_work(n, self.sizes) for n, r in self.inference.relations.items() if r.attention is not None}
        least = MAIN * max(work.values(), default=0)
        found = {}
        for node in (n for n, w in work.items() if w >= least):
            relation = self.inference.relations[node]
            atoms = heaviest_factor(self.inference, relation.operand_axes[relation.attention.q][-2])
            if atoms:
                found[node] = max(atoms, key=lambda a: self.sizes.hint(table.length(a)))
        return found

    def local_causal(self, relation: Relation, dim: int) -> float:
        """How much more than its share the busiest rank computes of a local causal attention whose rows are cut (`passes.attend.emit_local_causal`).

        One stretch of rows sees the keys up to its last one; several have a mask over whole keys.
        """
        spec = relation.attention
        if not self.prices.real or spec is None or not spec.is_causal or dim != len(relation.out_axes[0]) - 2:
            return 1.0
        rows, columns = (self.inference.table.example_length(relation.operand_axes[i][-2]) for i in (spec.q, spec.k))
        pairs, ranks = max(attention_pairs(rows, columns, True), 1), self.degrees.ranks
        axis = self.inference.table.expand_axis(relation.operand_axes[spec.q][-2])
        if not spec.plain or spec.dropout or len(axis) > 1 or len(axis[0]) > 1:
            return rows * columns / pairs
        return (pairs - attention_pairs(rows - -(-rows // ranks), columns, True)) * ranks / pairs

    def uneven(self, found: Division, atom: int) -> float:
        """Work of the busiest rank over the average: whole heads of a Ulysses rank, at real rates also the rows of an atom in a ring."""
        if not self.prices.real or found.degrees.ring == 1:
            return found.uneven
        ranks, length = self.degrees.ranks, self.sizes.hint(self.inference.table.length(atom))
        return found.uneven * -(-length // ranks) * ranks / max(length, 1)  # 0: where two parts end together in the example only

    def exposed(self, node: Node, relation: Relation, found: Division) -> float:
        """Share of a rotating block's price that counts: it travels while the one before it is attended, unless the link is slower than that."""
        u, r = found.degrees.ulysses, found.degrees.ring
        spec = relation.attention
        travels = sum(nbytes(relation.operands[i].meta["val"], self.sizes) for i in (spec.k, spec.v)) / u * self.prices.byte
        if not self.prices.real or r == 1 or not travels:
            return HIDDEN
        return max(HIDDEN, 1 - node_work(node, self.sizes) / (u * r) / travels)

    def packable(self, relation: Relation) -> tuple[Node, ...]:
        """Keys and values of a local attention, which one collective gathers (`passes.pack`)."""
        spec = relation.attention
        if not self.prices.real or spec is None:
            return ()
        k, v = relation.operands[spec.k], relation.operands[spec.v]
        return () if k is v or k.meta["val"].dtype != v.meta["val"].dtype else (k, v)
