"""Einsum equations: letters of the operands, and the work."""

from __future__ import annotations

import math
from collections.abc import Sequence


def read_equation(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Letters of every operand and of the result; the dims of an ellipsis are digits, counted from the right.

    >>> read_equation("...ij,jk->...ik", (4, 2))
    (['10ij', 'jk'], '10ik')
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = []
    for term, rank in zip(left.split(","), ranks, strict=True):
        hidden = "".join(str(i) for i in reversed(range(rank - len(term) + 3)))
        terms.append(term.replace("...", hidden))
    everything = "".join(terms)
    widest = "".join(sorted({c for c in everything if c.isdigit()}, reverse=True))
    if not arrow:
        out = "..." + "".join(sorted(c for c in set(everything) if everything.count(c) == 1 and not c.isdigit()))
    return terms, out.replace("...", widest)


def einsum_flops(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """Operations from left to right, a multiply-add counted as two; a product of pairs that sums nothing counts none."""
    terms, out = read_equation(equation, [len(shape) for shape in shapes])
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, n in zip(term, shape, strict=True):
            sizes[letter] = max(n, sizes.get(letter, 1))
    made, flops = set(terms[0]), 0
    for i, term in enumerate(terms[1:], 1):
        both = made | set(term)
        made = both & set(out).union(*terms[i + 1 :])
        flops += 2 * math.prod(sizes[x] for x in both) if made < both else 0
    return flops
