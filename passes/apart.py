"""Queries, keys and values of an attention that are one value become values of their own.

Before: %o = aten.scaled_dot_product_attention(%x, %x, %v)
After:  %x_1 = aten.alias(%x); %o = aten.scaled_dot_product_attention(%x, %x_1, %v)

What is one operand can have one layout only; queries and keys need two where rows are divided.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from seqpar.passes.build import Builder
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def operands_apart(gm: GraphModule) -> GraphModule:
    """A copy of `gm` in which every attention has three operands; `gm` itself if that is so already."""
    if not any(_repeats(node) for node in gm.graph.nodes):
        return gm
    graph = copied(gm.graph)
    for node in [n for n in graph.nodes if n.target is SDPA]:
        for i in _repeats(node):
            with graph.inserting_before(node):
                node.update_arg(i, Builder(graph, node).call(aten.alias.default, node.args[i]))
    graph.lint()
    return with_graph(gm, graph)


def _repeats(node: Node) -> list[int]:
    """Positions among queries, keys and values of an attention whose value stands at an earlier one, too."""
    return [i for i in range(1, 3) if node.args[i] in node.args[:i]] if node.target is SDPA else []
