"""Where the sequences of a model are that has no attention node: attention in a form of its own.

Four forms, the first that is found: `flex_attention` with functions that no mask can express; a softmax that weighs the rows of a product, `softmax(q k) v`; a state of all positions that
every position then reads, `q (k v)` (linear attention, Katharopoulos et al. 2020, section 3.2); scores without a softmax, `f(q k) v`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from seqpar.partitioner.atoms import Axis
from seqpar.partitioner.op import shape_of

if TYPE_CHECKING:
    from seqpar.partitioner.infer import Inference

aten = torch.ops.aten
MAX_STEPS = 8  # between a softmax or a state and the product that it enters
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class Form:
    """positions: the axis of the sequence. weight: multiplications that belong to it, but for the width of a head.
    rows_of: the node whose rows they are and the product that these rows enter, if keys must be whole for them."""

    positions: Axis
    weight: int
    rows_of: tuple[Node, Node] | None = None


def find_written(inference: Inference) -> list[Form]:
    """All of the first form that the graph has."""
    weights = [n for n, r in inference.relations.items() if n.target in SOFTMAX and n.args[1] in (-1, len(r.out_axes[0]) - 1)]
    products = [n for n in inference.relations if n.target in PRODUCTS and all(x in inference.input_dependent for x in n.all_input_nodes)]
    flex = [n for n in inference.relations if n.target is torch.ops.higher_order.flex_attention]
    return list(_flex(inference, flex)) or list(_rows(inference, weights)) or list(_states(inference, products)) or list(_rows(inference, products))


def _flex(inference: Inference, nodes: list[Node]) -> Iterator[Form]:
    for node in nodes:
        queries, keys = (inference.relations[node].operand_axes[i] for i in (0, 1))
        if queries[-2]:
            yield Form(queries[-2], math.prod(map(inference.table.example_length, (*queries[:-1], keys[-2]))), (node, node))


def _rows(inference: Inference, nodes: list[Node]) -> Iterator[Form]:
    for node in nodes:
        axes = inference.relations[node].out_axes[0]
        entered = _enters(inference, node, _same_rows, _weighs)
        if entered is not None and len(axes) > 1 and axes[-2]:
            yield Form(axes[-2], math.prod(map(inference.table.example_length, axes)), (node, entered[0]))


def _states(inference: Inference, products: list[Node]) -> Iterator[Form]:
    """Contractions over positions whose result meets the same positions again, where they stay: as rows, columns or a letter of the other side."""
    table, size = inference.table, inference.table.example_length
    for node in products:
        relation = inference.relations[node]
        summed = table.expand_axis(relation.operand_axes[0][-1])
        entered = _enters(inference, node, _no_larger, _reads)
        if entered is None or not summed:
            continue
        product, value = entered
        meets = inference.relations[product]
        kept = [table.expand_axis(meets.operand_axes[i][d]) for i, d in meets.flows if meets.operands[i] is not value]
        if summed in kept:
            yield Form(summed, size(summed) * math.prod(map(size, relation.out_axes[0])))


def _same_rows(inference: Inference, user: Node, node: Node) -> bool:
    return shape_of(user.meta["val"])[-2:-1] == shape_of(node.meta["val"])[-2:-1]


def _no_larger(inference: Inference, user: Node, node: Node) -> bool:
    elements, limit = (math.prod(map(inference.table.example_length, inference.axes[n][0])) for n in (user, node))
    return elements <= limit


def _weighs(user: Node, value: Node) -> bool:
    return user.target in PRODUCTS and user.args[0] is value


def _reads(user: Node, value: Node) -> bool:
    return user.target in (*PRODUCTS, aten.einsum.default)


def _enters(inference: Inference, node: Node, stays: Callable[[Inference, Node, Node], bool], enters: Callable[[Node, Node], bool]) -> tuple[Node, Node] | None:
    """The nearest product that `enters` says this value becomes part of, through values that `stays` accepts beside it, and the value that it reads."""
    reached = [node]
    for _ in range(MAX_STEPS):
        users = [(value, user) for value in reached for user in value.users]
        for value, user in users:
            if enters(user, value):
                return user, value
        reached = [u for u in dict.fromkeys(u for _, u in users) if isinstance(u.meta.get("val"), torch.Tensor) and stays(inference, u, node)]
    return None
