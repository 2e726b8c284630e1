"""The cross-entropy of tokens becomes operators on every token and one sum, so that logits stay divided.

Before: %l = aten.cross_entropy_loss(%logits, %target, None, 1, -100, 0.0)
After:  %p = gather(log_softmax(%logits, 1), 1, where(%target == -100, 0, %target)); %n = where(%target == -100, 0, -%p)
        %l = sum(%n) / sum(%target != -100)

The logits of a language model are its largest value: gathered whole, they would be most of what is communicated. As torch.nn.functional.cross_entropy defines it, class
indices without weights or smoothing; other forms stay.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from seqpar.partitioner.op import bind_arguments
from seqpar.passes.build import Builder
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
LOSS = aten.cross_entropy_loss.default
NONE, MEAN = 0, 1  # torch.nn._reduction


def losses_by_token(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with such losses written out; `gm` itself if it has none."""
    if not any(node.target is LOSS and _plain(node) for node in gm.graph.nodes):
        return gm
    graph = copied(gm.graph)
    for node in [n for n in graph.nodes if n.target is LOSS and _plain(n)]:
        with graph.inserting_before(node):
            node.replace_all_uses_with(_written_out(Builder(graph, node), node))
        graph.erase_node(node)
    graph.lint()
    return with_graph(gm, graph)


def _plain(node: Node) -> bool:
    call = bind_arguments(node)
    target = call["target"].meta["val"]
    return call["weight"] is None and call["label_smoothing"] == 0 and not target.is_floating_point() and call["self"].meta["val"].dim() > 1


def _written_out(build: Builder, node: Node) -> Node:
    call = bind_arguments(node)
    target, ignored = call["target"], call["ignore_index"]
    left_out = build.call(aten.eq.Scalar, target, ignored)
    index = build.call(aten.unsqueeze.default, build.call(aten.masked_fill.Scalar, target, left_out, 0), 1)
    chosen = build.call(aten.gather.default, build.call(aten.log_softmax.int, call["self"], 1), 1, index)
    lost = build.call(aten.masked_fill.Scalar, build.call(aten.neg.default, build.call(aten.squeeze.dim, chosen, 1)), left_out, 0)
    if call["reduction"] == NONE:
        return lost
    dtype = lost.meta["val"].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    loss = build.call(aten.sum.default, lost, dtype=wide)
    if call["reduction"] == MEAN:
        kept = build.call(aten.sum.default, build.call(aten.logical_not.default, left_out), dtype=wide)
        loss = build.call(aten.div.Tensor, loss, kept)
    return loss if wide is dtype else build.call(aten._to_copy.default, loss, dtype=dtype)
