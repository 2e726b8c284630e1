"""Does a causal ring deal its positions out in zigzag order? Where evening out the work is worth two more exchanges.

In a plain causal ring the last rank attends to all keys, the first to its own part. `runtime/zigzag.py` gives every rank the same
number of pairs, for one exchange of q, k and v and one of the result. Both sides are priced in operations, with the solver's prices.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from seqpar.partitioner.division import division, one_sequence
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.labels import KEYS, QUERY
from seqpar.partitioner.lengths import product, total
from seqpar.partitioner.op import outputs_of
from seqpar.partitioner.relation import Relation
from seqpar.partitioner.riders import riders_of
from seqpar.partitioner.solve import Solution
from seqpar.runtime.zigzag import arriving, visible_pairs

EXCHANGES = 2


def in_zigzag(inference: Inference, solution: Solution, node: Node) -> bool:
    """Whether this attention over the mesh works in zigzag order; the same answer on every rank."""
    relation = inference.relations[node]
    spec = relation.attention
    if node not in solution.labels.exchanged or not spec.is_causal or spec.mask is not None:
        return False
    found = division(inference, solution.degrees, solution.prices, node)
    if found.degrees.ring == 1:
        return False
    if not _one_sequence(inference, solution, node, relation):
        return False
    parts = ring_parts(inference, solution, relation)
    shapes = [[inference.table.sizes.hint(inference.table.axis_length(axis)) for axis in relation.operand_axes[i]] for i in (spec.q, spec.k, spec.v)]
    q_heads, kv_heads = (max(stop - start for start, stop in ranges) for ranges in (found.heads.queries, found.heads.keys))
    batch, dim, value_dim = shapes[0][0], shapes[0][3], shapes[2][3]
    saved = 2 * batch * q_heads * (dim + value_dim) * (max(plain_pairs(parts)) - max(visible_pairs(parts)))
    there, back = (max(arriving(parts, back=b)) for b in (False, True))
    moved = batch * (there * (q_heads * dim + kv_heads * (dim + value_dim)) + back * q_heads * value_dim) * outputs_of(node)[0].element_size()
    return saved > moved * solution.prices.byte + EXCHANGES * solution.prices.call


def ring_parts(inference: Inference, solution: Solution, relation: Relation) -> list[int]:
    """Example lengths of what every ring row holds of the one sequence."""
    table, degrees = inference.table, solution.degrees
    atoms, *inner = table.expand_axis(relation.operand_axes[relation.attention.q][-2])
    riders = riders_of(inference, degrees.ranks, degrees.ring)
    width = product(table.factor_length(f) for f in inner)
    rows = (range(j * degrees.ulysses, (j + 1) * degrees.ulysses) for j in range(degrees.ring))
    return [table.sizes.hint(product((width, total(riders.part(a, table.length(a), r, inference) for a in atoms for r in row)))) for row in rows]


def plain_pairs(parts: Sequence[int]) -> list[int]:
    """Pairs of query and key that every rank computes when it keeps its contiguous part."""
    return [n * (n + 1) // 2 + n * sum(parts[:r]) for r, n in enumerate(parts)]


def _one_sequence(inference: Inference, solution: Solution, node: Node, relation: Relation) -> bool:
    """Queries and keys are the same positions, cut alike, in one contiguous part per rank."""
    if not one_sequence(inference, relation, solution.degrees):
        return False
    atoms = inference.table.expand_axis(relation.operand_axes[relation.attention.q][-2])[0]
    return all((node, role, atom) in solution.labels.sharded for atom in atoms for role in (QUERY, KEYS))
