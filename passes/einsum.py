"""Two-operand einsums that are batched matrix products become `matmul`, so that attention written with them is recognised.

Before: %s = aten.einsum("bqhd,bkhd->bhqk", [%q, %k])
After:  %a = aten.permute(%q, [0, 2, 1, 3]); %b = aten.permute(%k, [0, 2, 3, 1]); %s = aten.matmul(%a, %b)

Beside a softmax, keys and values without a letter of the queries (heads that share them) get a dim of length 1 for it:

Before: %s = aten.einsum("bhqd,bkd->bhqk", [%q, %k])
After:  %b = aten.permute(%k, [0, 2, 1]); %c = aten.unsqueeze(%b, 1); %s = aten.matmul(%q, %c)
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

from seqpar.partitioner.cost import is_contraction
from seqpar.partitioner.op import shape_of
from seqpar.partitioner.written import MAX_STEPS, SOFTMAX

aten = torch.ops.aten
ELLIPSIS = "..."


@dataclass(frozen=True)
class MatrixProduct:
    """`[batch, spread, m, k] @ [batch, 1, k, n]` in terms of einsum letters; the result is permuted to `out`.

    spread: letters that only the left side has besides its rows. swapped: the left side is the einsum's second operand.
    """

    batch: str
    m: str
    k: str
    n: str
    left: str
    right: str
    out: str
    spread: str = ""
    swapped: bool = False

    @property
    def orders(self) -> tuple[list[int], list[int], list[int]]:
        """Permutations of the left operand, the right operand (without `spread`), and of the product."""
        made = self.batch + self.spread + self.m + self.n
        left = [self.left.index(x) for x in self.batch + self.spread + self.m + self.k]
        right = [self.right.index(x) for x in self.batch + self.k + self.n]
        return left, right, [made.index(x) for x in self.out]


def as_matrix_product(equation: str, ranks: tuple[int, int] = (0, 0), weights: int | None = None, spread: bool = False) -> MatrixProduct | None:
    """The matrix product an equation stands for, or None. ranks: dims of the operands, which say how many dims an ellipsis is.

    spread: one side may have more than rows for itself; those are the last such letter of the operand `weights`, or else of the result.

    >>> as_matrix_product("bqhd,bkhd->bhqk").orders
    ([0, 2, 1, 3], [0, 2, 3, 1], [0, 1, 2, 3])
    >>> as_matrix_product("...qd,...kd->...qk", (4, 4)).orders
    ([0, 1, 2, 3], [0, 1, 3, 2], [0, 1, 2, 3])
    >>> as_matrix_product("bghij,bgjd->bighd", weights=0, spread=True).spread
    'h'
    """
    equation = without_ellipsis(equation.replace(" ", ""), ranks)
    if "." in equation or "->" not in equation or equation.count(",") != 1:
        return None
    sides, out = equation.split("->")
    left, right = sides.split(",")
    if any(len(set(term)) != len(term) for term in (left, right, out)):
        return None
    ordered = out if weights is None else (left, right)[weights]
    own = [[out.find(x) for x in term if x not in other] for term, other in ((left, right), (right, left))]
    swapped = len(own[1]) > 1 if spread else own[0] > own[1]  # rows lie before columns
    left, right = (right, left) if swapped else (left, right)
    batch = "".join(x for x in out if x in left and x in right)
    free = sorted((x for x in left if x in out and x not in right), key=ordered.find)
    n = "".join(x for x in right if x in out and x not in left)
    k = "".join(x for x in left if x in right and x not in out)
    complete = set(left) == {*batch, *free, *k} and set(right) == set(batch + k + n)
    if not complete or len(n) != 1 or len(k) != 1 or not (len(free) == 1 or (spread and free)):
        return None
    return MatrixProduct(batch, free[-1], k, n, left, right, out, "".join(free[:-1]), swapped)


def without_ellipsis(equation: str, ranks: tuple[int, int]) -> str:
    """The equation with capital letters for an ellipsis that all terms have, of as many dims in both operands; else the equation itself."""
    terms = re.split(",|->", equation)
    lengths = {rank - len(term) + len(ELLIPSIS) for rank, term in zip(ranks, terms, strict=False)}
    if len(terms) != 3 or len(lengths) != 1 or min(lengths) < 0 or not all(ELLIPSIS in term for term in terms):
        return equation
    free = [x for x in string.ascii_uppercase if x not in equation]
    return equation.replace(ELLIPSIS, "".join(free[: lengths.pop()]))


def einsum_product(node: Node) -> MatrixProduct | None:
    """The matrix product of an einsum node with two different operands."""
    if node.target is not aten.einsum.default:
        return None
    equation, tensors = node.args[0], node.args[1]
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or tensors[0] is tensors[1]:
        return None
    left, right = (shape_of(x.meta["val"]) for x in tensors if isinstance(x, Node))
    product = as_matrix_product(str(equation), (len(left), len(right)))
    if product is None:
        weights = next((i for i, x in enumerate(tensors) if near_softmax([x], lambda n: n.all_input_nodes)), None)
        if weights is not None or near_softmax(node.users, lambda n: n.users):
            product = as_matrix_product(str(equation), (len(left), len(right)), weights, spread=True)
    if product is None:
        return None
    left, right = (right, left) if product.swapped else (left, right)
    if left[product.left.index(product.k)] != right[product.right.index(product.k)]:
        return None  # einsum repeats a contracted dim of length 1, a product does not
    return product


def near_softmax(nodes: Iterable[Node], further: Callable[[Node], Iterable[Node]]) -> bool:
    """Whether a softmax is among these or a few steps further, with no contraction between."""
    for _ in range(MAX_STEPS):
        nodes = list(dict.fromkeys(nodes))
        if any(n.target in SOFTMAX for n in nodes):
            return True
        nodes = [n for node in nodes if node.op == "call_function" and not is_contraction(node.target) for n in further(node)]
    return False
