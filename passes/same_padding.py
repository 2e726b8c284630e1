"""Convolutions that are told to keep the length, or not to pad, become ones with numbers, whose rows can be divided.

Before: %y = aten.conv1d.padding(%x, %w, %b, [1], "same")                    kernels of 7
After:  %y = aten.conv1d.default(%x, %w, %b, [1], [3])

Where one side would get more zeros than the other (even kernels) the call stays.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch.fx import GraphModule, Node

from seqpar.partitioner.op import bind_arguments, per_dim
from seqpar.passes.build import Builder
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
NUMBERED = MappingProxyType({aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default, aten.conv3d.padding: aten.conv3d.default})


def paddings_as_numbers(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with numbers in place of such words; `gm` itself if there are none."""
    found = {node: padding for node in gm.graph.nodes if node.target in NUMBERED and (padding := _padding(node)) is not None}
    if not found:
        return gm
    copies: dict[Node, Node] = {}
    graph = copied(gm.graph, copies)
    for original, padding in found.items():
        node, bound = copies[original], bind_arguments(copies[original])
        with graph.inserting_before(node):
            made = Builder(graph, node).call(NUMBERED[node.target], *(padding if name == "padding" else value for name, value in bound.items()))  # type: ignore[index]
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    graph.lint()
    return with_graph(gm, graph)


def _padding(node: Node) -> list[int] | None:
    bound = bind_arguments(node)
    kernel = bound["weight"].meta["val"].shape[2:]
    if bound["padding"] == "valid":
        return [0] * len(kernel)
    around = [d * (k - 1) for d, k in zip(per_dim(bound["dilation"], len(kernel)), kernel, strict=True)]
    return None if any(n % 2 for n in around) else [n // 2 for n in around]
