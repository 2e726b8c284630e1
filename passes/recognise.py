"""Attention written out becomes one attention node, so that it can use the mesh like any other.

Before: %s = aten.matmul(%q, %k_t); %m = aten.mul(%s, 0.25); %a = aten.add(%m, %mask); %p = aten.softmax(%a, -1); %o = aten.matmul(%p, %v)
After:  %k = aten.transpose(%k_t, -2, -1); %o = aten.scaled_dot_product_attention(%q, %k, %v, %mask, 0.0, False, scale=0.25)

Between the two products casts, clones, constant factors, added masks and fills with minus infinity are understood, as are `bmm` and `baddbmm`.
Anything else leaves the nodes as they are: correct, with whole keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from seqpar.partitioner.op import as_length, bind_arguments, is_tensor
from seqpar.passes.einsum import MatrixProduct, einsum_product
from seqpar.passes.share import with_graph

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)
CASTS = (aten._to_copy.default, aten.clone.default, aten.type_as.default, aten.alias.default, aten.detach.default)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass
class Written:
    """An attention found: `scores` = q @ k_t, and what happens to them before the softmax. masks: (kind, node, fill value)."""

    q: Node
    k_t: Node
    scale: float = 1.0
    masks: list[tuple[str, Node, float]] = field(default_factory=list)


def recognise_attention(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with written-out attentions as `scaled_dot_product_attention`; `gm` itself if there are none."""
    if not any(node.target in SOFTMAX for node in gm.graph.nodes):
        return gm
    graph = Graph()
    copies: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, copies)
    graph.output(output)
    for node in list(graph.nodes):
        product = einsum_product(node)
        if product is not None:
            expand_einsum(graph, node, product)
    changed = [rewrite(graph, node) for node in list(graph.nodes) if node.target in SOFTMAX]
    if not any(changed):
        return gm
    graph.eliminate_dead_code()
    graph.lint()
    return with_graph(gm, graph)


def expand_einsum(graph: Graph, node: Node, product: MatrixProduct) -> None:
    """Replace an einsum by permutes around a `matmul`."""
    left, right, out = product.orders
    with graph.inserting_before(node):
        build = Builder(graph, node)
        a, b = (build.permute(x, order) for x, order in zip(node.args[1], (left, right), strict=True))  # type: ignore[arg-type]
        node.replace_all_uses_with(build.permute(build.call(aten.matmul.default, a, b), out))
    graph.erase_node(node)


def rewrite(graph: Graph, softmax: Node) -> bool:
    """Replace the attention around one softmax; False if it is none."""
    dim = bind_arguments(softmax)["dim"]
    if dim not in (-1, len(softmax.meta["val"].shape) - 1):
        return False
    product = _weighted_values(softmax)
    found = _scores(softmax.args[0])  # type: ignore[arg-type]
    if product is None or found is None:
        return False
    values = product.args[1]
    if not isinstance(values, Node) or len({len(n.meta["val"].shape) for n in (found.q, found.k_t, values)}) != 1:
        return False
    if found.q.meta["val"].dtype != values.meta["val"].dtype or found.k_t.meta["val"].dtype != values.meta["val"].dtype:
        return False
    with graph.inserting_before(product):
        result = Builder(graph, product).attention(found, values, softmax)
    product.replace_all_uses_with(result)
    return True


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _weighted_values(softmax: Node) -> Node | None:
    """The product of the probabilities with the values, past casts and views that keep the last two dims."""
    node: Node | None = softmax
    while node is not None:
        user = _only_user(node)
        if user is None:
            return None
        if user.target in PRODUCTS:
            return user if user.args[0] is node and user.args[1] is not node and _same_batch(node, softmax) else None
        if not (user.target in CASTS or (user.target in VIEWS and _keeps_matrix(user))):
            return None
        node = user
    return None


def _keeps_matrix(view: Node) -> bool:
    """A view that regroups batch dims only."""
    before, after = view.args[0].meta["val"].shape, view.meta["val"].shape  # type: ignore[union-attr]
    return len(before) >= 2 and len(after) >= 2 and [as_length(s) for s in before[-2:]] == [as_length(s) for s in after[-2:]]


def _same_batch(a: Node, b: Node) -> bool:
    return [as_length(s) for s in a.meta["val"].shape] == [as_length(s) for s in b.meta["val"].shape]


def _scores(node: Node) -> Written | None:
    """Follow the softmax's input back to a product of two tensors."""
    scale = 1.0
    masks: list[tuple[str, Node, float]] = []
    shape = [as_length(s) for s in node.meta["val"].shape]
    while True:
        args = bind_arguments(node) if hasattr(node.target, "_schema") else {}
        if node.target in PRODUCTS:
            return Written(node.args[0], node.args[1], scale, masks)  # type: ignore[arg-type]
        if node.target is aten.baddbmm.default:
            return _baddbmm(args, scale, masks)
        step = _step(node, args)
        if step is None:
            return None
        kind, inner, other, number = step
        if [as_length(s) for s in inner.meta["val"].shape] != shape:
            return None
        if kind == "scale":
            scale *= number
        elif kind != "cast":
            if kind == "fill":
                # An added mask can hide a score, not replace it by a number: a row of such numbers only is seen evenly.
                if number * scale != -math.inf:
                    return None
            elif scale != 1.0:
                return None  # a mask added before a factor would have to be scaled as well
            masks.append((kind, other, number))
        node = inner


def _step(node: Node, args: dict[str, Any]) -> tuple[str, Node, Any, float] | None:
    """One operation between product and softmax: (kind, what it was applied to, mask or None, number)."""
    if node.target in CASTS:
        return "cast", args["self"], None, 0.0
    if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        number = args["other"]
        if isinstance(number, (int, float)):
            return "scale", args["self"], None, float(number) if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / number
        return None
    if node.target is aten.add.Tensor and args["alpha"] == 1 and is_tensor(args["other"]):
        a, b = args["self"], args["other"]
        inner, mask = (a, b) if _leads_to_product(a) else (b, a)
        return "add", inner, mask, 0.0
    if node.target is aten.masked_fill.Scalar:
        return "fill", args["self"], args["mask"], float(args["value"])
    return None


def _leads_to_product(node: Node) -> bool:
    """Scores are a product, perhaps scaled, cast or masked; a mask is not."""
    while isinstance(node, Node):
        if node.target in PRODUCTS or node.target is aten.baddbmm.default:
            return True
        if node.target in CASTS or node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.masked_fill.Scalar, aten.add.Tensor):
            node = node.args[0]  # type: ignore[assignment]
            continue
        return False
    return False


def _baddbmm(args: dict[str, Any], scale: float, masks: list[tuple[str, Node, float]]) -> Written | None:
    """beta * bias + alpha * (q @ k_t)"""
    if scale != 1.0 and args["beta"] != 0:
        return None
    if args["beta"] not in (0, 1):
        return None
    if args["beta"] == 1:
        masks = [*masks, ("add", args["self"], 0.0)]
    return Written(args["batch1"], args["batch2"], scale * args["alpha"], masks)


class Builder:
    """Emits the replacement before one node, with fake values computed as it goes."""

    def __init__(self, graph: Graph, at: Node) -> None:
        self.graph, self.at = graph, at

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update({k: v for k, v in self.at.meta.items() if k in ("stack_trace", "nn_module_stack")})
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = self.at.meta["val"].fake_mode
        with mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def permute(self, x: Node, order: list[int]) -> Node:
        return x if order == list(range(len(order))) else self.call(aten.permute.default, x, order)

    def attention(self, found: Written, values: Node, softmax: Node) -> Node:
        q, v = found.q, values
        k = self.call(aten.transpose.int, found.k_t, -2, -1)
        mask = self.mask(found, q)
        flat = len(q.meta["val"].shape) == 3
        if flat:  # batch and heads merged: all of it can be exchanged as heads
            q, k, v = (self.call(aten.unsqueeze.default, x, 0) for x in (q, k, v))
            mask = self.call(aten.unsqueeze.default, mask, 0) if mask is not None and len(mask.meta["val"].shape) == 3 else mask
        out = self.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, False, scale=found.scale)
        return self.call(aten.squeeze.dim, out, 0) if flat else out

    def mask(self, found: Written, q: Node) -> Node | None:
        """Added masks as they are; fills as added values (minus infinity as a boolean mask when it stands alone)."""
        if not found.masks:
            return None
        if len(found.masks) == 1 and found.masks[0][0] == "fill" and math.isinf(found.masks[0][2]):
            return self.call(aten.logical_not.default, found.masks[0][1])
        total: Node | None = None
        for kind, node, value in found.masks:
            if kind == "fill":
                zero = self.call(aten.zeros_like.default, node, dtype=q.meta["val"].dtype)
                node = self.call(aten.masked_fill.Scalar, zero, node, value)
            total = node if total is None else self.call(aten.add.Tensor, total, node)
        assert total is not None
        if total.meta["val"].dtype != q.meta["val"].dtype:
            total = self.call(aten._to_copy.default, total, dtype=q.meta["val"].dtype)
        return total
