"""Two-operand einsums that are batched matrix products become `matmul`, so that attention written with them is recognised.

Before: %s = aten.einsum("bqhd,bkhd->bhqk", [%q, %k])
After:  %a = aten.permute(%q, [0, 2, 1, 3]); %b = aten.permute(%k, [0, 2, 3, 1]); %s = aten.matmul(%a, %b)
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

import torch
from torch.fx import Node

from seqpar.partitioner.op import shape_of

aten = torch.ops.aten
ELLIPSIS = "..."


@dataclass(frozen=True)
class MatrixProduct:
    """`[batch, m, k] @ [batch, k, n]` in terms of einsum letters; the result is permuted to `out`."""

    batch: str
    m: str
    k: str
    n: str
    left: str
    right: str
    out: str

    @property
    def orders(self) -> tuple[list[int], list[int], list[int]]:
        """Permutations of the left operand, the right operand, and of the product."""
        made = self.batch + self.m + self.n
        left = [self.left.index(x) for x in self.batch + self.m + self.k]
        right = [self.right.index(x) for x in self.batch + self.k + self.n]
        return left, right, [made.index(x) for x in self.out]


def as_matrix_product(equation: str, ranks: tuple[int, int] = (0, 0)) -> MatrixProduct | None:
    """The matrix product an equation stands for, or None. ranks: dims of the operands, which say how many dims an ellipsis is.

    >>> as_matrix_product("bqhd,bkhd->bhqk").orders
    ([0, 2, 1, 3], [0, 2, 3, 1], [0, 1, 2, 3])
    >>> as_matrix_product("...qd,...kd->...qk", (4, 4)).orders
    ([0, 1, 2, 3], [0, 1, 3, 2], [0, 1, 2, 3])
    """
    equation = without_ellipsis(equation.replace(" ", ""), ranks)
    if "." in equation or "->" not in equation or equation.count(",") != 1:
        return None
    sides, out = equation.split("->")
    left, right = sides.split(",")
    if any(len(set(term)) != len(term) for term in (left, right, out)):
        return None
    batch = "".join(x for x in out if x in left and x in right)
    m = "".join(x for x in left if x in out and x not in right)
    n = "".join(x for x in right if x in out and x not in left)
    k = "".join(x for x in left if x in right and x not in out)
    complete = set(left) == set(batch + m + k) and set(right) == set(batch + k + n)
    return MatrixProduct(batch, m, k, n, left, right, out) if complete and len(m) == len(n) == len(k) == 1 else None


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
    if product is None or left[product.left.index(product.k)] != right[product.right.index(product.k)]:
        return None  # einsum repeats a contracted dim of length 1, a product does not
    return product
