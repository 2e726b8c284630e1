"""`flex_attention` that is no ordinary attention (capped scores, a log-sum-exp that is used) stays, in a form whose rows can be divided.

Before: %f = flex_attention(%q, %k, %v, score_mod, (…, mask_mod), 0.25, {…}, (), ())
After:  %r, %s = arange(Q, dtype=int32), …; %f = flex_attention(%q, %k, %v, score_mod_rows, (…, mask_mod_rows), 0.25, {…}, (%r,), (%s,))
        score_mod_rows(score, b, h, i, j, rows) = score_mod(score, b, h, rows[i], j)

A rank gets its part of the queries and of both `rows`. Lists of blocks that a kernel may skip are those of all rows, so they are left out: the kernel looks at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx import GraphModule

from seqpar.partitioner.lengths import same
from seqpar.partitioner.op import Op
from seqpar.passes.build import Builder
from seqpar.passes.flex import is_flex
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
ALL_ROWS = 1 << 30  # the size of a block that torch takes for "no blocks"
ROW_OF = {5: 3, 4: 2}  # arguments of score_mod (score, b, h, i, j) and mask_mod (b, h, i, j) -> where the row is


def flex_by_rows(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with such calls; `gm` itself if there is none."""
    if not any(is_flex(node) for node in gm.graph.nodes):
        return gm
    graph, extra = copied(gm.graph), {}
    for number, node in enumerate([n for n in graph.nodes if is_flex(n)]):
        q, k, v, score_mod, block_mask, scale, options, score_buffers, mask_buffers = node.args
        functions = {}
        for name, function, buffers, own in (("score", score_mod, score_buffers, 5), ("mask", block_mask[-1], mask_buffers, 4)):
            functions[name] = f"_flex_{name}_{number}"
            extra[functions[name]] = of_rows(getattr(gm, str(function.target)), own, len(buffers))
        with graph.inserting_before(node):
            build = Builder(graph, node)
            device = q.meta["val"].device
            places = [build.call(aten.arange.default, build.size(q, 2), dtype=torch.int32, device=device) for _ in range(2)]
            score, mask = (graph.get_attr(functions[name]) for name in ("score", "mask"))
            blocks = without_blocks(build, block_mask, device)
        node.meta["rule"] = rows_kept
        node.args = (q, k, v, score, (*blocks, mask), scale, options, (*score_buffers, places[0]), (*mask_buffers, places[1]))
    graph.eliminate_dead_code()
    return with_graph(gm, graph, extra)


def rows_kept(op: Op) -> None:
    """The rule of such a call: rows keep their place, queries and both `rows` are cut alike."""
    places = [op.index(buffers[-1]) for buffers in op.node.args[7:9]]  # type: ignore[index]
    if all(same(op.shapes[i][0], op.out_shape[2]) and op.tie(0, 2, i, 0) for i in places):
        for i, dim in ((0, 2), *((i, 0) for i in places)):
            op.carry(i, dim, 2)
    op.reason = "keys and values of an attention; its functions see batch and head"


def of_rows(function: GraphModule, own: int, buffers: int) -> GraphModule:
    """`function` of `own` positions (and the score) and `buffers` tensors, with a last argument: the rows' places in the whole sequence."""
    graph, known = fx.Graph(), {}
    old = list(function.graph.nodes)
    places = [node for node in old if node.op == "placeholder"]
    assert len(places) == own + buffers
    for node in places:
        known[node] = graph.node_copy(node)
    rows = graph.placeholder("rows")
    row = places[ROW_OF[own]]
    known[row] = graph.call_function(aten.index.Tensor, (rows, [known[row]]))
    for node in old[len(places) :]:
        known[node] = graph.node_copy(node, lambda n: known[n])
    return GraphModule(function, graph)


def without_blocks(build: Builder, block_mask: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """The fields of a `BlockMask` of one block for everything, but for its function: lengths, (numbers, indices) of keys, full keys, queries, full queries, sizes."""
    one, first, one_q, first_q = (build.call(aten.full.default, [1] * (3 + i % 2), 1 - i % 2, dtype=torch.int32, device=device) for i in range(4))
    lists = [one, first, None, None, one_q, first_q]
    return (1, 1, *lists, *[None] * (len(block_mask) - 5 - len(lists)), ALL_ROWS, ALL_ROWS)
