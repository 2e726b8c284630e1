"""Arithmetic on lengths that are integers or sympy expressions.

A `Length` is an `int` whenever it is known; with symbolic shapes it is a sympy expression over the input sizes.
Decisions (which of two is longer?) are taken on the example's sizes and recorded as conditions, so that a program
is only reused for sizes that would have led to the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypeAlias

import sympy

from seqpar.compat import FloorDiv

Length: TypeAlias = int | sympy.Expr


@lru_cache(maxsize=65536)
def _difference(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return sympy.expand(a - b)


def simplify(value: Length) -> Length:
    """An `int` if the expression is a number, else the expression."""
    if isinstance(value, int):
        return value
    return int(value) if value.is_number else value


def same(a: Length, b: Length) -> bool:
    """True if both are equal for every value of the symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or _difference(sympy.sympify(a), sympy.sympify(b)) == 0


def minus(a: Length, b: Length) -> Length:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return simplify(_difference(sympy.sympify(a), sympy.sympify(b)))


def total(lengths: Iterable[Length]) -> Length:
    result: Length = 0
    for length in lengths:
        result = result + length
    return simplify(result)


def product(lengths: Iterable[Length]) -> Length:
    result: Length = 1
    for length in lengths:
        result = result * length
    return simplify(result)


def part(length: Length, rank: int, ranks: int) -> Length:
    """Size of the contiguous part of a dim of `length` that `rank` of `ranks` holds; the first ranks hold the longer parts."""
    if isinstance(length, int):
        return (length + ranks - 1 - rank) // ranks
    return FloorDiv(length + (ranks - 1 - rank), ranks)


def fraction(length: Length, numerator: int, denominator: int) -> Length:
    """That part of a length, rounded down."""
    if numerator in (0, denominator):
        return length if numerator else 0
    return length * numerator // denominator if isinstance(length, int) else FloorDiv(length * numerator, denominator)


class Sizes:
    """Example values of the symbols, and the conditions under which decisions taken on them hold.

    A condition is kept with the atoms it is about, so that decisions about dims that turn out not to be sequences
    (rows of a position table) do not restrict the program.
    """

    def __init__(self, hints: Mapping[sympy.Symbol, int] | None = None) -> None:
        self._hints = dict(hints or {})
        self._cache: dict[sympy.Expr, int] = {}
        self._conditions: dict[sympy.Basic, set[int]] = {}

    def hint(self, value: Length) -> int:
        """The value for the example inputs."""
        if isinstance(value, int):
            return value
        known = self._cache.get(value)
        if known is None:
            known = self._cache[value] = int(value.xreplace({s: sympy.Integer(v) for s, v in self._hints.items()}))
        return known

    def assume(self, relation: sympy.Basic, about: Iterable[int]) -> None:
        """Record a relation that holds for the example and that decisions about these atoms rely on."""
        if relation not in (True, sympy.true):
            self._conditions.setdefault(relation, set()).update(about)

    def equal(self, a: Length, b: Length, about: Iterable[int]) -> bool:
        """a == b for the example; recorded when they are not equal for every value of the symbols."""
        if same(a, b):
            return True
        if (isinstance(a, int) and isinstance(b, int)) or self.hint(a) != self.hint(b):
            return False
        self.assume(sympy.Eq(a, b), about)
        return True

    def less(self, a: Length, b: Length, about: Iterable[int]) -> bool:
        """a < b for the example; recorded when it depends on the symbols."""
        if isinstance(a, int) and isinstance(b, int):
            return a < b
        answer = self.hint(a) < self.hint(b)
        self.assume(sympy.Lt(a, b) if answer else sympy.Ge(a, b), about)
        return answer

    def forget_conditions(self) -> None:
        """Start a new reading of the graph: atoms, and what was decided about them, begin anew."""
        self._conditions.clear()

    def conditions(self) -> list[tuple[sympy.Basic, frozenset[int]]]:
        return [(relation, frozenset(about)) for relation, about in self._conditions.items()]
