"""Scores by relative position become scores by position with one lookup per row, so that rows can be divided.

Transformer-XL (Dai et al. 2019, arXiv:1901.02860, appendix B) shifts row i of a matrix by i places to the left with pads, views and slices, in which rows of one
shape run over the rows of another. All of them only read one stretch of memory with another length of rows; that is what is looked for, however it is written.

Before: %v = aten.view(%x, [B, H, 2 S, S]); %s = aten.slice(%v, 2, 1); %w = aten.view(%s, [B, H, S, 2 S - 1]); %y = aten.slice(%w, 3, 0, S)      %x [B, H, S, 2 S]
After:  %i = arange(S)[None, :] - arange(S)[:, None] + S; %y = aten.gather(%x, 3, %i.expand(B, H, S, S))
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from seqpar.partitioner.lengths import Length, minus, product, same, total
from seqpar.partitioner.op import as_length, bind_arguments, is_tensor, shape_of
from seqpar.passes.build import Builder
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
PADS = (aten.pad.default, aten.constant_pad_nd.default)


def lookups_for_shifts(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with lookups in place of such shifts; `gm` itself if there is none."""
    found = {node: shift for node in gm.graph.nodes if node.target is aten.slice.Tensor and (shift := _shift(node))}
    if not found:
        return gm
    copies: dict[Node, Node] = {}
    graph = copied(gm.graph, copies)
    for node, (x, more) in found.items():
        with graph.inserting_before(copies[node]):
            copies[node].replace_all_uses_with(_looked_up(Builder(graph, copies[node]), copies[x], more))
    graph.eliminate_dead_code()
    graph.lint()
    return with_graph(gm, graph)


def _shift(node: Node) -> tuple[Node, int] | None:
    """(x, n) if a slice is x [.., S, P] read as [.., S, S] with y[i, j] = x[i, j - i + S + n]; None if it is anything else."""
    chain = [node]
    while (before := _input(chain[-1])) is not None:
        chain.append(before)
    for place in range(len(chain) - 1, 2, -1):  # the longest first
        x = chain[place]
        if len(x.meta["val"].shape) >= 2 and (more := _follow(x, chain[place - 1 :: -1])) is not None:
            return x, more
    return None


def _input(node: Node) -> Node | None:
    """What a pad, view or slice reads; None for other operators."""
    return node.args[0] if node.target in (*VIEWS, *PADS, aten.slice.Tensor) and is_tensor(node.args[0]) else None  # type: ignore[return-value]


def _follow(x: Node, steps: Sequence[Node]) -> int | None:
    """n of `_shift`, if these steps from `x` make that."""
    *lead, rows, columns = shape_of(x.meta["val"])
    at = len(lead)
    start: Length | None = 0  # the first entry that is seen, counted through all rows
    for before, node in zip([x, *steps], steps[:-1], strict=False):
        shape = shape_of(node.meta["val"])
        if start is None or len(shape) <= at or not all(map(same, shape[:at], lead)):
            return None
        start = start if node.target in VIEWS else _step(start, at, before, node)
    last, seen = steps[-1], shape_of(steps[-1].args[0].meta["val"])  # type: ignore[union-attr]
    cut = bind_arguments(last)
    if start is None or len(seen) != at + 2 or cut["dim"] % len(seen) != at + 1 or cut["step"] != 1 or not same(minus(columns, seen[-1]), 1):
        return None
    if not all(map(same, shape_of(last.meta["val"]), (*lead, rows, rows))):
        return None
    shift = total((_number(cut["start"] or 0), start))  # y[i, j] = x[i, j - i + shift]
    more, least, most = minus(shift, rows), minus(shift, minus(rows, 1)), minus(minus(columns, shift), rows)
    return more if all(isinstance(n, int) for n in (more, least, most)) and least >= 0 and most >= 0 else None


def _step(start: Length, at: int, before: Node, node: Node) -> Length | None:
    """The first entry that is seen after a slice of the outermost dim, or a pad behind it; None for other slices and pads."""
    seen, shape = shape_of(before.meta["val"]), shape_of(node.meta["val"])
    if node.target is aten.slice.Tensor:
        cut = bind_arguments(node)
        first, dim = _number(cut["start"] or 0), cut["dim"] % len(seen)
        if same(shape[dim], seen[dim]):
            return start
        whole_rows = dim == at and cut["step"] == 1 and not (isinstance(first, int) and first < 0)
        return total((start, product((first, *seen[at + 1 :])))) if whole_rows else None
    pads = bind_arguments(node)["pad"]
    behind = len(seen) == at + 1 and pads[0] == 0 and all(n == 0 for n in pads[2:])
    return start if behind else None


def _number(value: Any) -> Length:
    return as_length(value.meta["val"] if isinstance(value, Node) else value)


def _looked_up(build: Builder, x: Node, more: int) -> Node:
    """y[i, j] = x[i, j - i + S + more]."""
    value = x.meta["val"]
    lead, rows = [build.size(x, d) for d in range(value.dim() - 2)], build.size(x, value.dim() - 2)
    places = build.call(aten.arange.default, rows, device=value.device)
    shifts = build.call(aten.sub.Tensor, build.call(aten.unsqueeze.default, places, 0), build.call(aten.unsqueeze.default, places, 1))
    first = rows + more if isinstance(rows, int) else build.call(operator.add, rows, more)
    index = build.call(aten.add.Tensor, shifts, first)
    return build.call(aten.gather.default, x, value.dim() - 1, build.call(aten.expand.default, index, [*lead, rows, rows]))
