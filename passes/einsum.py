"""Two-operand einsums that are batched matrix products become `matmul`, so that attention written with them is recognised.

Before: %s = aten.einsum("bqhd,bkhd->bhqk", [%q, %k])
After:  %a = aten.permute(%q, [0, 2, 1, 3]); %b = aten.permute(%k, [0, 2, 3, 1]); %s = aten.matmul(%a, %b)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

aten = torch.ops.aten


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


def as_matrix_product(equation: str) -> MatrixProduct | None:
    """The matrix product an equation stands for, or None.

    >>> as_matrix_product("bqhd,bkhd->bhqk").orders
    ([0, 2, 1, 3], [0, 2, 3, 1], [0, 1, 2, 3])
    """
    equation = equation.replace(" ", "")
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


def einsum_product(node: Node) -> MatrixProduct | None:
    """The matrix product of an einsum node with two different operands."""
    if node.target is not aten.einsum.default:
        return None
    equation, tensors = node.args[0], node.args[1]
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or tensors[0] is tensors[1]:
        return None
    return as_matrix_product(str(equation))
