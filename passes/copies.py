"""Copies that nobody can tell from what they copy disappear: functionalisation leaves many.

Before: %y = aten.clone(%x)                       (a dropout that is switched off)
        %s = aten.slice(%table, 3, 0, None, 2); %c = aten.copy(%s, %half); %t = aten.slice_scatter(%table, %c, 3, 0, None, 2)
        %z = aten.clone(%p, memory_format=contiguous_format)
After:  readers of %y read %x;  %t = aten.slice_scatter(%table, %half, 3, 0, None, 2);  %z = aten.contiguous(%p)

Local values may be contiguous where traced ones are not, and real kernels give other strides than traced ones: then the last copies nothing.

A graph of ATen operators writes to nothing, so only a caller could tell two values of one storage apart, or a view that asks for strides:
whatever may reach an output through views stays a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from seqpar.compat import OpOverload
from seqpar.passes.share import with_graph

aten = torch.ops.aten
CONTIGUOUS = torch.contiguous_format
NEEDS_STRIDES = (aten.as_strided.default, aten.view.dtype)  # other views are emitted in forms that take any
MAY_RETURN_OPERAND = (aten.type_as.default, aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)  # though their schemas say that they do not


def drop_copies(gm: GraphModule) -> GraphModule:
    """The program without copies that only cost time; `gm` itself if it has none."""
    exposed = _exposed(gm.graph)
    found = {node: source for node in gm.graph.nodes if node not in exposed and (source := _copied(node)) is not None}
    laid_out = {node for node in gm.graph.nodes if node not in exposed and node.target is aten.clone.default and node.kwargs.get("memory_format") is CONTIGUOUS}
    if not found and not laid_out:
        return gm
    graph = fx.Graph()
    values: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        values[node] = values[found[node]] if node in found else graph.node_copy(node, values.__getitem__)
        if node in laid_out:
            values[node].target, values[node].kwargs = aten.contiguous.default, {}
    graph.eliminate_dead_code()
    return with_graph(gm, graph)


def _copied(node: Node) -> Node | None:
    """What the value of `node` equals in elements, sizes and dtype, if it is a copy; None if it is none."""
    if node.target is aten.clone.default and node.kwargs.get("memory_format") in (None, torch.preserve_format):
        return node.args[0] if isinstance(node.args[0], Node) else None
    if node.target is aten.copy.default and isinstance(node.args[1], Node):
        result, source = node.meta.get("val"), node.args[1].meta.get("val")
        if isinstance(result, Tensor) and isinstance(source, Tensor) and (result.dtype, result.device) == (source.dtype, source.device):
            same = len(result.shape) == len(source.shape) and all(_equal(a, b) for a, b in zip(result.shape, source.shape, strict=True))
            return node.args[1] if same else None
    return None


def _equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Without a guard on symbols."""
    left, right = (x.node.expr if isinstance(x, torch.SymInt) else x for x in (a, b))
    return bool(left == right)


def _exposed(graph: fx.Graph) -> set[Node]:
    """The nodes whose storage or strides somebody may see: outputs, what asks for strides, and through views what those are made of."""
    seen: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node.target in NEEDS_STRIDES or (node in seen and _may_alias(node)):
            seen.update(node.all_input_nodes)
    return seen


def _may_alias(node: Node) -> bool:
    """Whether the result may share storage with an operand."""
    if isinstance(node.target, OpOverload):
        return node.target in MAY_RETURN_OPERAND or any(result.alias_info is not None for result in node.target._schema.returns)
    return node.op == "call_function"
