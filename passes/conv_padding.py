"""What is put around the operand of a convolution becomes part of the call, and its rows can be divided.

Before: %p = aten.constant_pad_nd(%x, [1, 1, 1, 1, 2, 0]); %y = aten.conv3d(%p, %w, %b, [1, 1, 1], [0, 0, 0])
After:  %p = aten.constant_pad_nd(%x, [0, 0, 0, 0, 2, 0]); %y = aten.conv3d(%p, %w, %b, [1, 1, 1], [0, 1, 1])

Zeros, as many on both sides, are the convolution's padding; what is uneven (in front only, in a causal convolution) stays with the pad. For repeated edges, and uneven zeros
where the convolution has a stride, there is an operator of our own (`partitioner/edges.py`).
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from seqpar.partitioner.edges import CONV_EDGES
from seqpar.partitioner.op import bind_arguments, per_dim
from seqpar.partitioner.pads import around
from seqpar.passes.build import Builder
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def pads_in_convolutions(gm: GraphModule) -> GraphModule:
    """A copy of `gm` in which convolutions pad themselves; `gm` itself if none has such an operand."""
    found: dict[Node, list[int]] = {}
    for node in (node for node in gm.graph.nodes if node.op == "call_function" and node.target in CONVOLUTIONS):
        edges = _edges(node)
        even = [] if edges else _even(node)
        if edges or even:
            found[node] = even
    if not found:
        return gm
    copies: dict[Node, Node] = {}
    graph = copied(gm.graph, copies)
    for original, even in found.items():
        node = copies[original]
        padded = bind_arguments(node)["input"]
        with graph.inserting_before(node):
            build = Builder(graph, node)
            made = _padding_itself(build, node, even) if even else _with_edges(build, node)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        if not padded.users:
            graph.erase_node(padded)
    graph.lint()
    return with_graph(gm, graph)


def _padding_itself(build: Builder, node: Node, even: list[int]) -> Node:
    bound = bind_arguments(node)
    padded = bound["input"]
    left = [0 if i // 2 < len(even) and even[i // 2] else n for i, n in enumerate(padded.args[1])]
    x = build.call(aten.constant_pad_nd.default, padded.args[0], left) if any(left) else padded.args[0]
    padding = [n + m for n, m in zip(per_dim(bound["padding"], len(even)), reversed(even), strict=True)]
    return build.call(node.target, x, *(padding if name == "padding" else value for name, value in list(bound.items())[1:]))


def _with_edges(build: Builder, node: Node) -> Node:
    bound = bind_arguments(node)
    padded, spatial = bound["input"], len(bound["weight"].meta["val"].shape) - 2
    stride, dilation, own = (per_dim(bound[name], spatial) for name in ("stride", "dilation", "padding"))
    zeros = bool(around(padded, "constant"))
    pads = [*padded.args[1], *[0] * (2 * spatial - len(padded.args[1]))]
    both = [n + m for n, m in zip(pads, (n for n in reversed(own) for _ in range(2)), strict=True)]
    return build.call(CONV_EDGES, padded.args[0], bound["weight"], bound["bias"], stride, dilation, bound["groups"], both, zeros)


def _even(node: Node) -> list[int]:
    """Zeros on each side of the convolution's dims, last dim first, that the padded operand has and the convolution could make; empty if there are none."""
    bound = bind_arguments(node)
    spatial = len(bound["weight"].meta["val"].shape) - 2
    even = [before if before == after > 0 else 0 for before, after in around(bound["input"], "constant")[:spatial]]
    return [*even, *[0] * (spatial - len(even))] if any(even) else []


def _edges(node: Node) -> bool:
    """Whether the operand's edges are repeated around it, and nothing else is; or zeros are, unevenly in a dim with a stride."""
    bound = bind_arguments(node)
    spatial = len(bound["weight"].meta["val"].shape) - 2
    if len(bound["input"].meta["val"].shape) != spatial + 2:
        return False
    if around(bound["input"], "replicate"):
        return not any(per_dim(bound["padding"], 1))
    zeros, strides = around(bound["input"], "constant"), reversed(per_dim(bound["stride"], spatial))
    return len(zeros) <= spatial and min(map(min, zeros), default=0) >= 0 and any(a != b and stride > 1 for (a, b), stride in zip(zeros, strides, strict=False))
