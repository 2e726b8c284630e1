"""Attention written out becomes one attention node, so that it can use the mesh like any other.

Before: %s = aten.matmul(%q, %k_t); %m = aten.mul(%s, 0.25); %a = aten.add(%m, %mask); %p = aten.softmax(%a, -1); %o = aten.matmul(%p, %v)
After:  %k = aten.transpose(%k_t, -2, -1); %o = aten.scaled_dot_product_attention(%q, %k, %v, %mask, 0.0, False, scale=0.25)

Between the two products casts, clones, views that regroup batch and heads, constant factors, added masks and masked fills are understood,
as are `bmm` and `baddbmm`.
Anything else leaves the nodes as they are: correct, with whole keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from seqpar.partitioner.lengths import Length
from seqpar.partitioner.op import as_length, bind_arguments, is_tensor
from seqpar.partitioner.written import PRODUCTS, SOFTMAX
from seqpar.passes.build import Builder
from seqpar.passes.einsum import MatrixProduct, einsum_product
from seqpar.passes.grouped import merged, shares_heads
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
CASTS = (aten._to_copy.default, aten.clone.default, aten.type_as.default, aten.alias.default, aten.detach.default)
BETWEEN = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.masked_fill.Scalar, aten.add.Tensor)
WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


ABSORBS = -5e8  # filling scores with less than this is the same as adding it


@dataclass(frozen=True)
class Mask:
    """Something between the product and the softmax: node added ("add"), or `value` put where node is true ("fill") or false ("keep").

    lead, dtype: of the scores there. scale: what multiplied the scores afterwards.
    """

    kind: str
    node: Node
    value: float
    lead: tuple[Length, ...]
    dtype: torch.dtype
    scale: float = 1.0


@dataclass
class Written:
    """An attention found: `scores` = q @ k_t, and what happens to them before the softmax."""

    q: Node
    k_t: Node
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)


def recognise_attention(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with written-out attentions as `scaled_dot_product_attention`; `gm` itself if there are none.

    Where there may be attention of another form, einsums that are matrix products become such for `partitioner.written` to read.
    """
    targets = {node.target for node in gm.graph.nodes}
    if targets.isdisjoint(SOFTMAX) and aten.scaled_dot_product_attention.default in targets:
        return gm
    graph = copied(gm.graph)
    products = [(node, product) for node in graph.nodes if (product := einsum_product(node)) is not None]
    for node, product in products:
        expand_einsum(graph, node, product)
    changed = [rewrite(graph, node, gm) for node in list(graph.nodes) if node.target in SOFTMAX]
    if not products and not any(changed):
        return gm
    graph.eliminate_dead_code()
    graph.lint()
    return with_graph(gm, graph)


def expand_einsum(graph: Graph, node: Node, product: MatrixProduct) -> None:
    """Replace an einsum by permutes around a `matmul`."""
    left, right, out = product.orders
    tensors: list[Node] = list(node.args[1])  # type: ignore[arg-type]
    first, second = reversed(tensors) if product.swapped else tensors
    with graph.inserting_before(node):
        build = Builder(graph, node)
        a, b = build.permute(first, left), build.permute(second, right)
        for _ in product.spread:
            b = build.call(aten.unsqueeze.default, b, len(product.batch))
        node.replace_all_uses_with(build.permute(build.call(aten.matmul.default, a, b), out))
    graph.erase_node(node)


def rewrite(graph: Graph, softmax: Node, gm: GraphModule) -> bool:
    """Replace the attention around one softmax; False if it is none."""
    dim = bind_arguments(softmax)["dim"]
    if dim not in (-1, len(softmax.meta["val"].shape) - 1):
        return False
    product = _weighted_values(softmax)
    found = _scores(softmax.args[0], gm)  # type: ignore[arg-type]
    if product is None or found is None:
        return False
    values = product.args[1]
    lead = _widest([_lead(softmax), *(m.lead for m in found.masks)])
    if not isinstance(values, Node) or not all(_regroups(n, lead) for n in (found.q, found.k_t, values)):
        return False
    if not all(m.lead == lead or _regroups(m.node, lead, m.lead) for m in found.masks):
        return False
    if found.q.meta["val"].dtype != values.meta["val"].dtype or found.k_t.meta["val"].dtype != values.meta["val"].dtype:
        return False
    with graph.inserting_before(product):
        build = AttentionBuilder(graph, product)
        result = build.like(build.attention(found, values, lead), product)
    product.replace_all_uses_with(result)
    return True


def _lengths(node: Node) -> tuple[Length, ...]:
    return tuple(as_length(s) for s in node.meta["val"].shape)


def _lead(node: Node) -> tuple[Length, ...]:
    return _lengths(node)[:-2]


def _widest(leads: list[tuple[Length, ...]]) -> tuple[Length, ...]:
    """Of the batch dims that scores have on their way, where they all are numbers, those in which batch and heads are apart: a mask may have but one of them."""
    known = [lead for lead in leads if all(isinstance(n, int) for n in lead)]
    return max(leads, key=len) if known == leads else leads[0]


def _regroups(node: Node, lead: tuple[Length, ...], level: tuple[Length, ...] | None = None) -> bool:
    """Whether `node` can have the batch dims `lead`: of as many dims already, or all of the scores' batch dims where it is used, in numbers."""
    own = _lead(node)
    if len(own) == len(lead) and level is None:
        return True
    if level is not None and all(n == 1 for n in own):
        return True
    return (level is None or own == level) and all(isinstance(n, int) for n in (*own, *lead)) and math.prod(own) == math.prod(lead)


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
            return user if user.args[0] is node and user.args[1] is not node else None
        if not (user.target in CASTS or (user.target in VIEWS and _keeps_matrix(user))):
            return None
        node = user
    return None


def _keeps_matrix(view: Node) -> bool:
    """A view that regroups batch dims only."""
    before, after = view.args[0].meta["val"].shape, view.meta["val"].shape  # type: ignore[union-attr]
    return len(before) >= 2 and len(after) >= 2 and [as_length(s) for s in before[-2:]] == [as_length(s) for s in after[-2:]]


def _scores(node: Node, gm: GraphModule) -> Written | None:
    """Follow the softmax's input back to a product of two tensors."""
    scale = 1.0
    masks: list[Mask] = []
    while True:
        args = bind_arguments(node) if hasattr(node.target, "_schema") else {}
        if node.target in PRODUCTS:
            return Written(node.args[0], node.args[1], scale, masks)  # type: ignore[arg-type]
        if node.target is aten.baddbmm.default:
            return _baddbmm(node, args, scale, masks)
        if node.target in VIEWS and _keeps_matrix(node):
            node = args["self"]
            continue
        step = _step(node, args, gm)
        if step is None:
            return None
        kind, inner, other, number = step
        if _lengths(inner) != _lengths(node):
            return None
        if kind == "scale":
            scale *= number
        elif kind != "cast":
            if kind != "add" and number * scale > ABSORBS:
                return None  # an added mask can hide a score, not replace it by a number: a row of such numbers only is seen evenly
            masks.append(Mask(kind, other, number, _lead(node), node.meta["val"].dtype, scale))
        node = inner


def _step(node: Node, args: dict[str, Any], gm: GraphModule) -> tuple[str, Node, Any, float] | None:
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
    if node.target in WHERE:
        return _choice(args, gm)
    return None


def _choice(args: dict[str, Any], gm: GraphModule) -> tuple[str, Node, Any, float] | None:
    """A `where` between scores and a number, on either side."""
    for kind, scores, number in (("keep", args["self"], args["other"]), ("fill", args["other"], args["self"])):
        value = _number(number, gm)
        if value is not None and is_tensor(scores):
            return kind, scores, args["condition"], value
    return None


def _number(value: Any, gm: GraphModule) -> float | None:
    """The number a scalar is, also one that was traced as a constant tensor."""
    while isinstance(value, Node) and value.target in CASTS:
        value = value.args[0]
    if isinstance(value, Node) and value.op == "get_attr" and value.meta["val"].ndim == 0 and str(value.target).startswith("_constant"):
        return float(getattr(gm, str(value.target)))
    if isinstance(value, Node) and value.target in (aten.full.default, aten.scalar_tensor.default) and value.meta["val"].ndim == 0:
        value = value.args[-1]
    return float(value) if isinstance(value, (int, float)) else None


def _leads_to_product(node: Node) -> bool:
    """Scores are a product, perhaps scaled, cast or masked; a mask is not."""
    while isinstance(node, Node):
        if node.target in PRODUCTS or node.target is aten.baddbmm.default:
            return True
        if node.target in CASTS or node.target in BETWEEN or (node.target in VIEWS and _keeps_matrix(node)):
            node = node.args[0]  # type: ignore[assignment]
            continue
        if node.target in WHERE:
            return any(_leads_to_product(side) for side in node.args[1:] if isinstance(side, Node))
        return False
    return False


def _baddbmm(node: Node, args: dict[str, Any], scale: float, masks: list[Mask]) -> Written | None:
    """beta * bias + alpha * (q @ k_t)"""
    if args["beta"] != 0:
        masks = [*masks, Mask("add", args["self"], 0.0, _lead(node), node.meta["val"].dtype, scale * args["beta"])]
    return Written(args["batch1"], args["batch2"], scale * args["alpha"], masks)


def filled(mask: Mask, *dtypes: torch.dtype) -> float:
    """What a fill makes of scores, in an added mask of these types: infinite if it was, else no more than they can hold."""
    number, limit = mask.value * mask.scale, min(torch.finfo(dtype).max for dtype in dtypes)
    overflows = abs(number) > torch.finfo(mask.dtype).max
    return math.copysign(math.inf, number) if overflows else max(-limit, min(limit, number))


class AttentionBuilder(Builder):
    """Emits the replacement before one node."""

    def attention(self, found: Written, values: Node, lead: tuple[Length, ...]) -> Node:
        q, v = self.regroup(found.q, lead), self.regroup(values, lead)
        k = self.call(aten.transpose.int, self.regroup(found.k_t, lead), -2, -1)
        mask = self.mask(found, q, lead)
        flat = len(lead) == 1
        if flat:  # batch and heads merged: all of it can be exchanged as heads
            q, k, v = (self.call(aten.unsqueeze.default, x, 0) for x in (q, k, v))
            mask = self.call(aten.unsqueeze.default, mask, 0) if mask is not None and len(mask.meta["val"].shape) == 3 else mask
        grouped = shares_heads(lead, _lead(k), _lead(v)) and (mask is None or merged(_lead(mask), lead) is not None)
        if grouped:
            k, v = (self.call(aten.squeeze.dim, x, 2) for x in (k, v))
            q, mask = self.merge(q, lead), self.merge(mask, lead) if mask is not None else None
        elif self.heads(k) != self.heads(v):
            k, v = (self.call(aten.expand.default, x, [-1, self.heads(q), -1, -1]) if self.heads(x) == 1 else x for x in (k, v))
        out = self.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, False, scale=found.scale, enable_gqa=grouped)
        return self.call(aten.squeeze.dim, out, 0) if flat else out

    @staticmethod
    def heads(x: Node) -> Length:
        """Of [batch, heads, rows, dim]; 0 for other shapes."""
        lead = _lead(x)
        return lead[1] if len(lead) == 2 else 0

    def merge(self, x: Node, lead: tuple[Length, ...]) -> Node:
        """Queries or a mask with groups and their heads in one dim."""
        dims = merged(_lead(x), lead)
        return self.reshape(x, [*dims, *x.meta["val"].shape[-2:]]) if dims else x

    def regroup(self, x: Node, lead: tuple[Length, ...]) -> Node:
        """Other batch dims, of which `_regroups` has said that they are possible."""
        own = _lead(x)
        if len(own) == len(lead):
            return x
        rows = list(x.meta["val"].shape[-2:])
        return self.reshape(x, rows if all(n == 1 for n in own) and math.prod(lead) != 1 else [*lead, *rows])

    def like(self, x: Node, old: Node) -> Node:
        """`x` in the shape of the node it replaces."""
        return x if _lengths(x) == _lengths(old) else self.reshape(x, list(old.meta["val"].shape))

    def reshape(self, x: Node, shape: list[Any]) -> Node:
        """Batch dims are numbers here; a symbolic length can be left open."""
        open_dims = [i for i, n in enumerate(shape) if not isinstance(n, int)]
        sizes = [self.call(aten.sym_size.int, x, i - len(shape)) if i in open_dims[1:] else -1 if i in open_dims else n for i, n in enumerate(shape)]
        return self.call(aten.reshape.default, x, sizes)

    def mask(self, found: Written, q: Node, lead: tuple[Length, ...]) -> Node | None:
        """Added masks as they are; fills as added values (minus infinity as a boolean mask when it stands alone)."""
        if not found.masks:
            return None
        first = found.masks[0]
        if len(found.masks) == 1 and first.kind != "add" and math.isinf(first.value):
            node = self.regroup(first.node, lead) if first.lead != lead else first.node
            return node if first.kind == "keep" else self.call(aten.logical_not.default, node)
        total: Node | None = None
        for mask in reversed(found.masks):  # as they were applied: a fill replaces what was there
            node = self.regroup(mask.node, lead) if mask.lead != lead else mask.node
            if mask.kind == "add":
                node = node if mask.scale == 1.0 else self.call(aten.mul.Scalar, node, mask.scale)
                total = node if total is None else self.call(aten.add.Tensor, total, node)
            else:
                hidden = self.call(aten.logical_not.default, node) if mask.kind == "keep" else node
                total = total if total is not None else self.call(aten.zeros_like.default, node, dtype=q.meta["val"].dtype)
                total = self.call(aten.masked_fill.Scalar, total, hidden, filled(mask, total.meta["val"].dtype, q.meta["val"].dtype))
        assert total is not None
        if len(total.meta["val"].shape) == 3 and len(lead) == 2:  # kernels want two dims or four
            total = self.call(aten.unsqueeze.default, total, 0)
        if total.meta["val"].dtype != q.meta["val"].dtype:
            total = self.call(aten._to_copy.default, total, dtype=q.meta["val"].dtype)
        return total
