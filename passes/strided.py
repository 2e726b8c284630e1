"""Reads by stride become reads of the values in one row, in the order in which the model holds them in memory.

Before: %y = aten.as_strided(%x, size, stride, offset)                       %x [4, 16, 8], of which memory holds [16, 4, 8]
After:  %p = aten.permute(%x, [1, 0, 2]); %r = aten.reshape(%p, [-1]); %y = read_row(%r, size, stride, offset')

A local value, or a gathered one, has strides of its own: read with those of the model, other elements would be taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from seqpar.errors import UnsupportedError
from seqpar.partitioner.lengths import Length, minus, product, same
from seqpar.partitioner.op import as_length
from seqpar.passes.build import Builder
from seqpar.passes.localise import source_line
from seqpar.passes.share import copied, with_graph
from seqpar.runtime.strided import read_row, write_row

aten = torch.ops.aten
READ, WRITE = aten.as_strided.default, aten.as_strided_scatter.default


def strides_in_rows(gm: GraphModule) -> GraphModule:
    """A copy of `gm` in which only rows are read and written by stride; `gm` itself if nothing is.

    Raises:
        UnsupportedError: something outside of the value is read, or the value has gaps in memory.
    """
    if not any(node.target in (READ, WRITE) for node in gm.graph.nodes):
        return gm
    graph = copied(gm.graph)
    for node in list(graph.nodes):
        if node.target in (READ, WRITE):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_in_a_row(Builder(graph, node), node))
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    return with_graph(gm, graph)


def _in_a_row(build: Builder, node: Node) -> Node:
    x, source = node.args[0], node.args[1:2] if node.target is WRITE else ()
    size, stride, *offset = node.args[1 + len(source) :]
    value = x.meta["val"]  # type: ignore[union-attr]
    order = _memory_order(value)
    start = _start(value, offset[0] if offset else None)
    if order is None or start is None or not _inside(value, node.meta["val"] if node.target is READ else source[0].meta["val"], stride, start):  # type: ignore[union-attr]
        raise UnsupportedError(
            f"{node.target} reads memory around the values that it is given, or over gaps between them, and a program for several ranks holds other memory.\n"
            f"{source_line(node)}Call .contiguous() on them before, and count strides and offset from there, or use .unfold(). Lengths that are symbols may hide it: try dynamic=False."
        )
    rows = build.call(aten.reshape.default, build.permute(x, order), [-1])  # type: ignore[arg-type]
    if node.target is READ:
        return build.call(read_row, rows, size, stride, start)
    written = build.call(write_row, rows, *source, size, stride, start)
    shape = [build.size(x, d) for d in order]  # type: ignore[arg-type]
    return build.permute(build.call(aten.reshape.default, written, shape), [order.index(d) for d in range(len(order))])


def _memory_order(value: torch.Tensor) -> list[int] | None:
    """The dims from the outermost in memory to the innermost; None if there are gaps or repetitions."""
    shape, strides = [as_length(n) for n in value.shape], [as_length(n) for n in value.stride()]
    order = [d for d, n in enumerate(shape) if same(n, 1)]
    rest = [d for d in range(len(shape)) if d not in order]
    inner: list[int] = []
    expected: Length = 1
    while rest:
        found = next((d for d in reversed(rest) if same(strides[d], expected)), None)
        if found is None:
            return None
        rest.remove(found)
        inner.insert(0, found)
        expected = product((expected, shape[found]))
    return order + inner


def _start(value: torch.Tensor, offset: Any) -> int | None:
    """Where the first element that is read is among those of `value`; None if it is before them, or not known."""
    if offset is None:
        return 0
    if isinstance(offset, Node):
        offset = offset.meta["val"]
    start = minus(as_length(offset), as_length(value.storage_offset()))
    return start if isinstance(start, int) and start >= 0 else None


def _inside(value: torch.Tensor, window: torch.Tensor, stride: Any, start: int) -> bool:
    """False if the last element that is read is certainly behind those of `value`."""
    numbers = [start, *window.shape, *stride, *value.shape]
    if not all(isinstance(n, int) for n in numbers) or window.numel() == 0:
        return True
    return start + sum((n - 1) * step for n, step in zip(window.shape, stride, strict=True)) < value.numel()
