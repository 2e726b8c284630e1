"""Zeros that are put around the operand of a convolution, as many on both sides, become its padding, and its rows can be divided.

Before: %p = aten.constant_pad_nd(%x, [1, 1, 1, 1, 2, 0]); %y = aten.conv3d(%p, %w, %b, [1, 1, 1], [0, 0, 0])
After:  %p = aten.constant_pad_nd(%x, [0, 0, 0, 0, 2, 0]); %y = aten.conv3d(%p, %w, %b, [1, 1, 1], [0, 1, 1])

What is uneven (in front only, in a causal convolution) stays with the pad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from seqpar.partitioner.op import bind_arguments
from seqpar.partitioner.zeros import zeros_around
from seqpar.passes.build import Builder
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def pads_in_convolutions(gm: GraphModule) -> GraphModule:
    """A copy of `gm` in which convolutions pad themselves; `gm` itself if none has such an operand."""
    if not any(_even(node) for node in gm.graph.nodes):
        return gm
    graph = copied(gm.graph)
    for node in list(graph.nodes):
        even = _even(node)
        if not even:
            continue
        bound = bind_arguments(node)
        padded = bound["input"]
        left = [0 if i // 2 < len(even) and even[i // 2] else n for i, n in enumerate(padded.args[1])]
        with graph.inserting_before(node):
            build = Builder(graph, node)
            x = build.call(aten.constant_pad_nd.default, padded.args[0], left) if any(left) else padded.args[0]
            padding = [n + m for n, m in zip(_each(bound["padding"], len(even)), reversed(even), strict=True)]
            made = build.call(node.target, x, *(padding if name == "padding" else value for name, value in list(bound.items())[1:]))
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        if not padded.users:
            graph.erase_node(padded)
    graph.lint()
    return with_graph(gm, graph)


def _even(node: Node) -> list[int]:
    """Zeros on each side of the convolution's dims, last dim first, that the padded operand has and the convolution could make; empty if there are none."""
    if node.op != "call_function" or node.target not in CONVOLUTIONS:
        return []
    bound = bind_arguments(node)
    spatial = len(bound["weight"].meta["val"].shape) - 2
    even = [before if before == after > 0 else 0 for before, after in zeros_around(bound["input"])[:spatial]]
    return [*even, *[0] * (spatial - len(even))] if any(even) else []


def _each(value: Any, dims: int) -> Sequence[int]:
    """One number per dim, of an argument that may give one for all."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers
