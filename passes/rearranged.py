"""Operators that only rearrange become what they are made of, so that every dim can be followed.

Before: %y = aten.pixel_shuffle(%x, 2)                                                            [B, 4 C, H, W] -> [B, C, 2 H, 2 W]
After:  %v = aten.view(%x, [B, C, 2, 2, H, W]); %p = aten.permute(%v, [0, 1, 4, 2, 5, 3]); %y = aten.reshape(%p, [B, C, 2 H, 2 W])
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from seqpar.passes.build import Builder
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
SHUFFLES = (aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
CHANNELS = (aten.channel_shuffle.default, aten.native_channel_shuffle.default)


def rearranged(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with views and permutes in place of shuffles; `gm` itself if there is none."""
    if not any(node.target in (*SHUFFLES, *CHANNELS) for node in gm.graph.nodes):
        return gm
    graph = copied(gm.graph)
    for node in list(graph.nodes):
        if node.target in SHUFFLES or node.target in CHANNELS:
            with graph.inserting_before(node):
                node.replace_all_uses_with((pixels if node.target in SHUFFLES else channels)(Builder(graph, node), node))
            graph.erase_node(node)
    graph.lint()
    return with_graph(gm, graph)


def pixels(build: Builder, node: Node) -> Node:
    x, r = node.args
    rank = len(x.meta["val"].shape)  # type: ignore[union-attr]
    batch = [build.size(x, d) for d in range(rank - 3)]  # type: ignore[arg-type]
    channels, height, width = (build.size(x, d) for d in range(rank - 3, rank))  # type: ignore[arg-type]
    if node.target is aten.pixel_shuffle.default:
        inner, order = [_over(build, channels, r * r), r, r, height, width], (0, 3, 1, 4, 2)  # type: ignore[operator]
        outer = [_over(build, channels, r * r), _times(build, height, r), _times(build, width, r)]  # type: ignore[operator]
    else:
        inner, order = [channels, _over(build, height, r), r, _over(build, width, r), r], (0, 2, 4, 1, 3)
        outer = [_times(build, channels, r * r), _over(build, height, r), _over(build, width, r)]  # type: ignore[operator]
    return _moved(build, x, [*batch, *inner], [*range(len(batch)), *(len(batch) + d for d in order)], [*batch, *outer])


def channels(build: Builder, node: Node) -> Node:
    x, groups = node.args
    sizes = [build.size(x, d) for d in range(len(x.meta["val"].shape))]  # type: ignore[arg-type,union-attr]
    inner = [sizes[0], groups, _over(build, sizes[1], groups), *sizes[2:]]
    return _moved(build, x, inner, [0, 2, 1, *range(3, len(inner))], sizes)


def _moved(build: Builder, x: Any, inner: list[Any], order: list[int], outer: list[Any]) -> Node:
    return build.call(aten.reshape.default, build.permute(build.call(aten.view.default, x, inner), order), outer)


def _times(build: Builder, size: Any, n: Any) -> Any:
    return size * n if isinstance(size, int) else build.call(operator.mul, size, n)


def _over(build: Builder, size: Any, n: Any) -> Any:
    return size // n if isinstance(size, int) else build.call(operator.floordiv, size, n)
