"""A mask that is always the lower triangle becomes `is_causal`, one that hides nothing disappears.

Before: %m = le(unsqueeze(arange(16), 0), unsqueeze(arange(16), 1)); %o = scaled_dot_product_attention(%q, %k, %v, %m)
After:  %o = scaled_dot_product_attention(%q, %k, %v, None, 0.0, True)

Models that are traced often build their triangle even where they would not eagerly. What follows from sizes alone has one value in this program, so it is computed
here. A value of many elements is not computed but described (`Shape`), which is exact as well: rows and columns that are compared
are small. With symbolic sizes nothing is known, and masks stay.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from seqpar.compat import FakeTensor
from seqpar.partitioner.op import bind_arguments
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
SMALL = 2**20  # elements
ARBITRARY = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default, aten.new_empty_strided.default)
CONSTANTS = {
    aten.ones.default: 1.0, aten.new_ones.default: 1.0, aten.ones_like.default: 1.0,
    aten.zeros.default: 0.0, aten.new_zeros.default: 0.0, aten.zeros_like.default: 0.0,
}  # fmt: skip
FULL = (aten.full.default, aten.new_full.default, aten.full_like.default)
KEEPS = (
    aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default,
    aten.clone.default, aten.detach.default, aten.slice.Tensor, aten.squeeze.dim, aten.lift_fresh_copy.default, aten.contiguous.default,
)  # fmt: skip
ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
NOTS = (aten.logical_not.default, aten.bitwise_not.default)
ORDERS = {aten.le.Tensor: "le", aten.lt.Tensor: "lt", aten.ge.Tensor: "ge", aten.gt.Tensor: "gt"}
MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}


class Shape(enum.Enum):
    """Every matrix (last two dims) of a large value."""

    LOWER = "True where column <= row"
    UPPER = "True where column > row"
    ADDED = "0 where column <= row, else minus infinity"


@dataclass(frozen=True)
class Same:
    """A large value whose elements are all this number."""

    number: float


def simplify_masks(gm: GraphModule, small: int = SMALL) -> GraphModule:
    """A copy of `gm` in which masks known to be a triangle, or to hide nothing, are gone; `gm` itself if there is none.

    small: the most elements of a value that is computed.
    """
    masked = [n for n in gm.graph.nodes if n.target is aten.scaled_dot_product_attention.default and isinstance(bind_arguments(n)["attn_mask"], Node)]
    known = evaluate(gm, gm.graph, [bind_arguments(n)["attn_mask"] for n in masked], small)
    found = {n: kind for n in masked if (kind := _kind(n, known.get(bind_arguments(n)["attn_mask"]))) is not None}
    if not found:
        return gm
    copies: dict[Node, Node] = {}
    graph = copied(gm.graph, copies)
    for node, kind in found.items():
        copy = copies[node]
        dropout = bind_arguments(node)["dropout_p"]
        copy.args = (*copy.args[:3], None, dropout, kind is Shape.LOWER)
        copy.kwargs = {k: v for k, v in copy.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")}
    graph.eliminate_dead_code()
    graph.lint()
    return with_graph(gm, graph)


def _kind(attention: Node, mask: Any) -> Shape | Same | None:
    """What a known mask means to this attention."""
    q, k = (attention.args[i].meta["val"].shape[-2] for i in (0, 1))  # type: ignore[union-attr]
    if isinstance(mask, Tensor):
        mask = _describe(mask)
    if mask in (Shape.LOWER, Shape.ADDED):
        place = bind_arguments(attention)["attn_mask"].meta["val"]
        return Shape.LOWER if tuple(place.shape[-2:]) == (q, k) else None
    if isinstance(mask, Same):
        boolean = bind_arguments(attention)["attn_mask"].meta["val"].dtype == torch.bool
        return mask if mask.number == (1.0 if boolean else 0.0) else None
    return None


def _describe(x: Tensor) -> Shape | Same | None:
    """A computed value in the words of large ones."""
    if x.is_complex() or x.numel() == 0:
        return None
    if bool((x == x.flatten()[0]).all()):
        return Same(float(x.flatten()[0]))
    if x.ndim < 2:
        return None
    lower = torch.ones(x.shape[-2:], dtype=torch.bool).tril().expand(x.shape)
    if x.dtype == torch.bool:
        return Shape.LOWER if torch.equal(x, lower) else Shape.UPPER if torch.equal(x, ~lower) else None
    hidden = torch.zeros(x.shape, dtype=x.dtype).masked_fill(~lower, -math.inf) if x.is_floating_point() else None
    return Shape.ADDED if hidden is not None and torch.equal(x, hidden) else None


# -- what is known ---------------------------------------------------------------------------------
def evaluate(gm: GraphModule, graph: Graph, wanted: Sequence[Node], small: int = SMALL) -> dict[Node, Any]:
    """Values (or what describes them) of the nodes that `wanted` follow from, in the graph of `gm` or a copy of it; what depends on inputs or weights is missing.

    Of the constants in `gm` those count that stand as numbers in the model's code: others belong to somebody, who may change them.
    """
    needed = set(wanted)
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    known: dict[Node, Any] = {}
    for node in graph.nodes:
        if node not in needed:
            continue
        if node.op == "get_attr" and all(user.target is aten.lift_fresh_copy.default for user in node.users):
            value = getattr(gm, str(node.target), None)
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta and value.numel() <= small:
                known[node] = value.cpu()
        elif node.op == "call_function" and getattr(node.target, "namespace", "") == "aten" and (_is_constant(node) or all(n in known for n in node.all_input_nodes)):
            value = _value(node, known, small)
            if value is not None:
                known[node] = value
    return known


def _value(node: Node, known: dict[Node, Any], small: int) -> Any:
    out = node.meta.get("val")
    if not isinstance(out, Tensor) or not all(isinstance(n, int) for n in out.shape):
        return None
    if node.target in ARBITRARY or torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
        return None
    if _is_constant(node):
        number = _number(node)
        return torch.full(out.shape, number, dtype=out.dtype) if out.numel() <= small else Same(float(number))
    operands = [known[n] for n in node.all_input_nodes]
    if out.numel() <= small and all(isinstance(x, Tensor) for x in operands):
        place = {"device": torch.device("cpu")} if node.kwargs.get("device") is not None else {}
        args, kwargs = map_arg((node.args, {**node.kwargs, **place}), known.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return _described(node, bind_arguments(node), known)


def _number(node: Node) -> Any:
    return CONSTANTS[node.target] if node.target in CONSTANTS else bind_arguments(node)["fill_value"]


def _is_constant(node: Node) -> bool:
    """One number everywhere, whatever the content of an operand that only lends its type."""
    return (node.target in CONSTANTS or node.target in FULL) and isinstance(_number(node), (int, float))


def _described(node: Node, args: dict[str, Any], known: dict[Node, Any]) -> Shape | Same | None:
    """What describes the large result of one operator."""
    target, out = node.target, node.meta["val"]
    first, second = (_read(args.get(name), known) for name in ("self", "other"))
    if target in ORDERS or target is aten.eq.Tensor:
        return _compared(target, first, second) if isinstance(first, Tensor) and isinstance(second, Tensor) else None
    large = first if not isinstance(first, Tensor) else _describe(first)
    if target in KEEPS:
        source = args["self"].meta["val"]
        kept = isinstance(large, Same) or source.shape[-2:] == out.shape[-2:]
        return large if kept else None
    if target is aten._to_copy.default:
        same_kind = out.dtype == torch.bool or out.is_floating_point() == args["self"].meta["val"].is_floating_point()
        return large if isinstance(large, Same) or (same_kind and large is not Shape.ADDED) or (large is Shape.ADDED and out.is_floating_point()) else None
    if target in NOTS and out.dtype == torch.bool:
        return {Shape.LOWER: Shape.UPPER, Shape.UPPER: Shape.LOWER}.get(large)  # type: ignore[arg-type]
    if target in ANDS and out.dtype == torch.bool:
        other = second if not isinstance(second, Tensor) else _describe(second)
        return next((b for a, b in ((large, other), (other, large)) if a == Same(1.0) or (a == b and a is not None)), None)
    if target is aten.tril.default and args["diagonal"] == 0 and out.dtype == torch.bool and large == Same(1.0):
        return Shape.LOWER
    if target is aten.triu.default and args["diagonal"] == 1:
        return Shape.UPPER if out.dtype == torch.bool and large == Same(1.0) else Shape.ADDED if large == Same(-math.inf) else None
    if target is aten.masked_fill.Scalar and args["value"] == -math.inf and large == Same(0.0):
        return Shape.ADDED if _read(args["mask"], known) is Shape.UPPER else None
    return None


def _read(argument: Any, known: dict[Node, Any]) -> Any:
    return known.get(argument) if isinstance(argument, Node) else None


def _compared(target: Any, a: Tensor, b: Tensor) -> Shape | Same | None:
    """A comparison of a row of numbers with a column of numbers."""
    if target is aten.eq.Tensor:
        numbers = torch.cat([a.flatten(), b.flatten()])
        return Same(1.0) if bool((numbers == numbers[0]).all()) else None
    order = ORDERS[target]
    if a.ndim >= 2 and b.ndim >= 1 and a.shape[-1] == a.numel() and b.ndim >= 2 and b.shape[-2] == b.numel():
        a, b, order = b, a, MIRRORED[order]
    if a.ndim < 2 or a.shape[-2] != a.numel() or b.ndim < 1 or b.shape[-1] != b.numel():
        return None
    rows, columns = a.flatten().contiguous(), b.flatten().contiguous()  # rows `order` columns
    if not bool((columns[1:] >= columns[:-1]).all()):
        return None
    # In order, the columns up to a number are the first ones: how many are <= (or <) the row's own number?
    before = torch.searchsorted(columns, rows, right=order in ("ge", "lt"))
    triangle = torch.equal(before, torch.arange(1, len(rows) + 1).clamp(max=len(columns)))
    complement = order in ("lt", "le")
    if triangle:
        return Shape.UPPER if complement else Shape.LOWER
    everything = 0 if complement else len(columns)
    return Same(1.0) if bool((before == everything).all()) else None
