"""Which whole values may differ in their last bits between ranks, and outputs made equal again.

A whole part computed beside a sharded one (`[text | image/N]` through one matmul) meets a different number of rows on ranks whose
parts have different sizes, and kernels may then round differently. Inside one call of the model this is harmless, but an
output that differs would let ranks drift apart over denoising steps: such outputs are taken from rank 0.

Before: %text_out = aten.slice(%joint, 1, 0, 7); output (%text_out,)
After:  %text_out = aten.slice(%joint, 1, 0, 7); %same = first_rank(%text_out, group="sp"); output (%same,)
"""

from __future__ import annotations

import torch
from torch.fx import Node

from seqpar.partitioner.candidates import origin
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.marker import BOUNDARY
from seqpar.partitioner.relation import Relation
from seqpar.runtime.opaque import run_opaque

aten = torch.ops.aten
MOVES = frozenset(
    {
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default,
        aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.expand.default, aten.repeat.default,
        aten.cat.default, aten.stack.default, aten.slice.Tensor, aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int,
        aten.select.int, aten.clone.default, aten.alias.default, aten.constant_pad_nd.default, aten.view_as_real.default,
        aten.view_as_complex.default, aten._to_copy.default, aten.type_as.default, BOUNDARY,
    }
)  # fmt: skip


def diverging(view: LayoutView) -> set[Node]:
    """Nodes whose whole parts are not certain to have the same bits on every rank."""
    found: set[Node] = set()
    for node, relation in view.inference.relations.items():
        if node in view.labels.exchanged or node in view.labels.split or view.reduced(node, relation):
            continue  # computed once and exchanged, or merged in one order: the same everywhere
        inherits = any(origin(n) in found and not _all_sharded(view, n) for i, n in enumerate(relation.operands) if i not in relation.free)
        if inherits or node.target is run_opaque or (node.target not in MOVES and _mixed(view, relation, node)):
            found.add(node)
    return found


def _mixed(view: LayoutView, relation: Relation, node: Node) -> bool:
    """Whole and unevenly sharded atoms side by side in one dim."""
    table = view.inference.table
    for dim, axis in enumerate(relation.out_axes[0]):
        for factor in table.expand_axis(axis):
            sharded = [a for a in factor if (node, dim, a) in view.labels.sharded]
            uneven = any(not isinstance(table.length(a), int) or len(set(view.parts(a))) > 1 for a in sharded)
            if uneven and len(sharded) < len(factor):
                return True
    return False


def _all_sharded(view: LayoutView, node: Node) -> bool:
    """Every position of the value is held by one rank only."""
    for axis, sharded in zip(view.inference.axes[node][0], view.produced(node), strict=True):
        if sharded and any(set(f) <= sharded for f in view.inference.table.expand_axis(axis)):
            return True
    return False
