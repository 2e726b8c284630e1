"""Lengths: integers stay integers, expressions are compared for all values, decisions on examples are recorded."""

import pytest
import sympy

from seqpar.partitioner.lengths import Sizes, minus, part, product, same, simplify, total

s = sympy.Symbol("s", positive=True, integer=True)
t = sympy.Symbol("t", positive=True, integer=True)


def test_integers_stay_integers():
    for value in (total([3, 4]), product([3, 4]), minus(7, 3), simplify(sympy.Integer(5)), total([s, 3 - s]), minus(s + 4, s), product([])):
        assert type(value) is int


def test_same_holds_for_every_value():
    assert same(s + t, t + s) and same(2 * (s + 1), 2 * s + 2) and same(4, 4)
    assert not same(s, t) and not same(s, 4) and not same(3, 4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [0, 1, 5, 7, 12, 29])
def test_parts_partition_the_length(length, ranks):
    parts = [part(length, r, ranks) for r in range(ranks)]
    assert sum(parts) == length and max(parts) - min(parts) <= 1 and parts == sorted(parts, reverse=True)
    assert parts == [int(part(s, r, ranks).subs(s, length)) for r in range(ranks)]


def test_decisions_are_recorded_with_what_they_are_about():
    sizes = Sizes({s: 10, t: 4})
    assert sizes.hint(s + 2 * t) == 18
    assert sizes.less(t, s, (1, 2)) and not sizes.less(s, t, (3,)) and sizes.less(2, 3, (9,))
    assert dict(sizes.conditions()) == {sympy.Lt(t, s): frozenset({1, 2}), sympy.Ge(s, t): frozenset({3})}
    sizes.assume(sympy.true, (5,))
    assert len(sizes.conditions()) == 2
    sizes.forget_conditions()
    assert sizes.conditions() == []


def test_equal_by_example_is_a_condition():
    sizes = Sizes({s: 4, t: 4})
    assert sizes.equal(s, s, (1,)) and sizes.conditions() == []
    assert sizes.equal(s, t, (1,)) and dict(sizes.conditions()) == {sympy.Eq(s, t): frozenset({1})}
    assert not sizes.equal(3, 4, (1,)) and not sizes.equal(s, 5, (1,))
