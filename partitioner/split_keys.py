"""Attention of few queries to many keys: every rank attends all queries to the keys that it holds, and the partial results are merged.

Before: gather or exchange keys and values, B (Hk D + Hk Dv) of every position                 an exchange pays for the many
After:  attend the own keys; gather B H Sq (Dv + 1) numbers of every rank and merge them       it pays for the few

The split of keys is that of Flash-Decoding (Dao et al. 2023, https://pytorch.org/blog/flash-decoding/), over ranks instead of the blocks of one device.
"""

from __future__ import annotations

from seqpar.partitioner.cost import nbytes
from seqpar.partitioner.division import are_groups, head_counts
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.op import outputs_of
from seqpar.partitioner.relation import Relation

ACCUMULATED = 4  # bytes per number of a partial result, at least
CLEARLY = 4  # times fewer bytes: results are exchanged at every attention and hide behind nothing, keys may be gathered once for several


def can_split(inference: Inference, relation: Relation, ranks: int) -> bool:
    """Its keys are one dim with a sequence of at least a position per rank, and partial results of all ranks are clearly fewer bytes than its keys and values."""
    spec, table = relation.attention, inference.table
    if not spec.plain or spec.dropout or spec.is_causal:  # causal: few queries see the first keys only
        return False
    columns = table.expand_axis(relation.operand_axes[spec.k][-2])
    if not are_groups(*head_counts(inference, relation)) or len(columns) != 1:
        return False
    longest = max((table.sizes.hint(table.length(a)) for a in columns[0] if a in inference.sequences), default=0)
    held = sum(nbytes(outputs_of(relation.operands[i])[0], table.sizes) for i in (spec.k, spec.v))
    return longest >= ranks and CLEARLY * ranks * partial_bytes(inference, relation) < held


def partial_bytes(inference: Inference, relation: Relation) -> int:
    """Of one rank's result for all queries, with its log-sum-exp."""
    batch, heads, rows, width = (inference.table.example_length(axis) for axis in relation.out_axes[0])
    return batch * heads * rows * (width + 1) * max(ACCUMULATED, relation.operands[relation.attention.v].meta["val"].element_size())


def received_bytes(inference: Inference, relation: Relation, ranks: int) -> int:
    """What one rank receives to merge the results of all."""
    return (ranks - 1) * partial_bytes(inference, relation)

