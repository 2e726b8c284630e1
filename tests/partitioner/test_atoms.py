"""Atoms: merging, cutting, and refusing what would cut an atom against itself."""

import random

import sympy

from seqpar.partitioner.atoms import AtomTable
from seqpar.partitioner.lengths import Sizes

s = sympy.Symbol("s", positive=True, integer=True)


def table(**hints):
    return AtomTable(Sizes({sympy.Symbol(k, positive=True, integer=True): v for k, v in hints.items()}))


def lengths(t, factor):
    return [t.length(a) for a in t.expand(factor)]


def test_equal_atoms_become_one():
    t = table()
    a, b = t.fresh(8), t.fresh(8)
    assert t.unify((a,), (b,)) and t.expand((a,)) == t.expand((b,))


def test_unify_cuts_at_the_other_sides_boundaries():
    t = table()
    text, image, joint = t.fresh(5), t.fresh(7), t.fresh(12)
    assert t.unify((text, image), (joint,))
    assert t.expand((joint,)) == (text, image)
    other = t.fresh(3), t.fresh(9)
    assert t.unify(other, (joint,)) and lengths(t, (joint,)) == [3, 2, 7] and lengths(t, (text,)) == [3, 2]


def test_shifted_against_itself_is_refused():
    t = table()
    x = t.fresh(12)
    front, back = t.sublist((x,), 0, 11), t.sublist((x,), 1, 12)
    assert not t.unify(front, back)
    assert sum(lengths(t, (x,))) == 12


def test_rotated_halves_are_not_merged():
    t = table()
    x = t.fresh(12)
    a, b = t.sublist((x,), 0, 6), t.sublist((x,), 6, 12)
    assert not t.unify((*b, *a), (x,)), "positions 0.. would be held where positions 6.. are"
    assert t.expand((x,)) == (*a, *b) and a != b


def test_sublist_and_its_limits():
    t = table()
    x = t.fresh(10)
    assert lengths(t, t.sublist((x,), 2, 7)) == [5] and lengths(t, (x,)) == [2, 5, 3]
    assert t.sublist((x,), 0, 10) == t.expand((x,))
    assert t.sublist((x,), 4, 4) == ()
    assert t.sublist((x,), 0, 11) is None
    twice = t.fresh(6)
    assert t.sublist((twice, twice), 2, 6) is None, "cutting the first occurrence would cut the second"
    assert t.sublist((twice, twice), 6, 12) == (twice,)


def test_products():
    t = table()
    frames, rows, both = t.fresh(3), t.fresh(4), t.fresh(12)
    assert t.axis_length(((frames,), (rows,))) == 12 and t.axis_length(()) == 1
    assert not t.unify_axes(((frames,), (rows,)), ((both,),))
    assert not t.unify_axes(((frames,), (rows,)), ((rows,), (frames,)))
    assert t.unify_axes(((frames,), (rows,)), ((t.fresh(3),), (t.fresh(4),)))
    assert t.fresh_axis(1) == ()


def test_symbolic_lengths():
    t = table(s=9)
    text, joint = t.fresh(5), t.fresh(s + 5)
    image = t.fresh(s)
    assert t.unify((text, image), (joint,)) and t.expand((joint,)) == (text, image)
    kept = t.sublist((joint,), 5, s + 5)
    assert kept == (image,)
    assert t.sublist((joint,), 0, 2) is not None and lengths(t, (joint,)) == [2, 3, s]


def test_equal_by_example_is_recorded():
    t = table(s=5)
    a, b = t.fresh(s), t.fresh(5)
    assert t.unify((a,), (b,))
    assert [str(c) for c, _ in t.sizes.conditions()] == [str(sympy.Eq(s, 5))]


def test_random_cuts_keep_every_length():
    rng = random.Random(0)
    for _ in range(100):
        t = table()
        total = rng.randint(2, 30)
        factors = []
        for _ in range(rng.randint(2, 4)):
            cuts = sorted(rng.sample(range(1, total), rng.randint(0, min(4, total - 1))))
            bounds = [0, *cuts, total]
            factors.append((cuts, tuple(t.fresh(b - a) for a, b in zip(bounds, bounds[1:], strict=False))))
        for (_, f), (_, g) in zip(factors, factors[1:], strict=False):
            assert t.unify(f, g)
        boundaries = sorted({c for cuts, _ in factors for c in cuts} | {0, total})
        expected = [b - a for a, b in zip(boundaries, boundaries[1:], strict=False)]
        for _, f in factors:
            assert lengths(t, f) == expected and t.expand(f) == t.expand(factors[0][1])
