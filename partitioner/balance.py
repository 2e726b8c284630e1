"""Does a causal ring deal its positions out in zigzag order? Where evening out the work is worth two more exchanges.

In a plain causal ring the last rank attends to all keys, the first to its own part. `runtime/zigzag.py` gives every rank the same
number of pairs, for one exchange of q, k and v and one of the result. Both sides are priced in operations, with the solver's prices.
"""

from __future__ import annotations

from torch.fx import Node

from seqpar.partitioner.division import division, same_positions
from seqpar.partitioner.exchange_bytes import ExchangeBytes
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.labels import KEYS, QUERY
from seqpar.partitioner.riders import riders_of
from seqpar.partitioner.solve import Solution
from seqpar.partitioner.zigzag import plain_pairs, visible_pairs

EXCHANGES = 2


def in_zigzag(inference: Inference, solution: Solution, node: Node) -> bool:
    """Whether this attention over the mesh works in zigzag order; the same answer on every rank."""
    relation, degrees = inference.relations[node], solution.degrees
    spec = relation.attention
    if node not in solution.labels.exchanged or not spec.is_causal or spec.mask is not None:
        return False
    found = division(inference, degrees, solution.prices, node)
    if found.degrees.ring == 1 or not same_positions(inference, relation):
        return False
    riders = riders_of(inference, degrees.ranks, degrees.ring)
    counted = ExchangeBytes(inference, node, found, riders)
    atoms = inference.table.expand_axis(relation.operand_axes[spec.q][-2])[0]
    parts = counted.row_parts
    batch, _, _, dim, value_dim = (inference.table.sizes.hint(inference.table.axis_length(axis)) for axis in (*relation.operand_axes[spec.q], relation.operand_axes[spec.v][3]))
    q_heads = max(stop - start for start, stop in found.heads.queries)
    saved = 2 * batch * q_heads * (dim + value_dim) * (max(plain_pairs(parts, riders.is_one_stretch(atoms))) - max(visible_pairs(parts)))
    cut = [(i, [a for a in atoms if (node, role, a) in solution.labels.sharded]) for i, role in ((spec.q, QUERY), (spec.k, KEYS), (spec.v, KEYS))]
    return saved > max(counted.zigzag(cut)) * solution.prices.byte + EXCHANGES * solution.prices.call
