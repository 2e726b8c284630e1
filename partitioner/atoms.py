"""Atoms: the indivisible stretches of positions that dims are made of.

    Factor = tuple of atoms, one after the other        [text | image]
    Axis   = tuple of factors, multiplied, outermost first      batch x [text | image] x 2

Every dim of every value has an axis; a dim of length 1 has the empty axis. Atoms are identities: two dims that share
an atom are cut over the ranks in the same way. Atoms are merged (`unify`) and cut as the graph is read, so a factor is
only meaningful through `AtomTable.expand`.
"""

from __future__ import annotations

from seqpar.partitioner.lengths import Length, Sizes, minus, product, same, total

Factor = tuple[int, ...]
Axis = tuple[Factor, ...]


class AtomTable:
    """Owns the atoms of one graph.

    Invariants: an atom is a root, or forwards to the atoms that replaced it (one after a merge, several after a cut)
    whose lengths add up to its own.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._length: list[Length] = []
        self._forward: list[Factor | None] = []

    # -- creating and reading ------------------------------------------------------------------
    def fresh(self, length: Length) -> int:
        self._length.append(length)
        self._forward.append(None)
        return len(self._length) - 1

    def fresh_axis(self, length: Length) -> Axis:
        return () if isinstance(length, int) and length == 1 else ((self.fresh(length),),)

    def length(self, atom: int) -> Length:
        return self._length[atom]

    def expand(self, factor: Factor) -> Factor:
        """The root atoms that `factor` consists of now."""
        if all(self._forward[a] is None for a in factor):
            return factor
        out: list[int] = []
        for atom in factor:
            forward = self._forward[atom]
            if forward is None:
                out.append(atom)
            else:
                self._forward[atom] = forward = self.expand(forward)
                out.extend(forward)
        return tuple(out)

    def expand_axis(self, axis: Axis) -> Axis:
        return tuple(self.expand(f) for f in axis)

    def roots(self, axis: Axis) -> set[int]:
        """All root atoms of an axis."""
        return {a for f in self.expand_axis(axis) for a in f}

    def factor_length(self, factor: Factor) -> Length:
        return total(self._length[a] for a in factor)

    def axis_length(self, axis: Axis) -> Length:
        return product(self.factor_length(f) for f in axis)

    def example_length(self, axis: Axis) -> int:
        """Length of an axis for the example inputs."""
        return self.sizes.hint(self.axis_length(axis))

    # -- merging and cutting -------------------------------------------------------------------
    def _cut(self, atom: int, at: Length) -> Factor:
        parts = (self.fresh(at), self.fresh(minus(self._length[atom], at)))
        self._forward[atom] = parts
        return parts

    def unify(self, a: Factor, b: Factor) -> bool:
        """Make two factors of equal length consist of the same atoms, cutting where a boundary of one falls inside the other.

        Returns False (some atoms may have been merged by then, which is harmless) if the same atom would have to be
        cut against itself, as in `x[:, 1:] + x[:, :-1]`, or lengths cannot be matched.
        """
        left, right = list(self.expand(a)), list(self.expand(b))
        while left and right:
            x, y = left[0], right[0]
            if x == y:
                left.pop(0), right.pop(0)
                continue
            length_x, length_y = self._length[x], self._length[y]
            if self.sizes.equal(length_x, length_y, (x, y)):
                if y in left or x in right:
                    return False
                self._forward[y] = (x,)
                left.pop(0), right.pop(0)
                left, right = self._refresh(left), self._refresh(right)
                continue
            if y in left or x in right:
                return False
            if self.sizes.less(length_x, length_y, (x, y)):
                self._cut(y, length_x)
            else:
                self._cut(x, length_y)
            left, right = self._refresh(left), self._refresh(right)
        return not left and not right

    def _refresh(self, atoms: list[int]) -> list[int]:
        return list(self.expand(tuple(atoms)))

    def unify_axes(self, a: Axis, b: Axis) -> bool:
        """Unify factor by factor. False if the products differ in structure (frames x rows against one atom)."""
        a, b = self.expand_axis(a), self.expand_axis(b)
        if a == b:
            return True
        if len(a) != len(b):
            return False
        if not all(self.sizes.equal(self.factor_length(f), self.factor_length(g), (*f, *g)) for f, g in zip(a, b, strict=True)):
            return False
        return all(self.unify(f, g) for f, g in zip(a, b, strict=True))

    def sublist(self, factor: Factor, start: Length, stop: Length) -> Factor | None:
        """The atoms of positions [start, stop), cutting at both ends; None if the boundaries cannot be placed."""
        atoms = self._split_at(self.expand(factor), start)
        if atoms is None:
            return None
        rest = self._split_at(atoms[1], minus(stop, start))
        return None if rest is None else rest[0]

    def _split_at(self, factor: Factor, at: Length) -> tuple[Factor, Factor] | None:
        before: list[int] = []
        remaining = at
        for i, atom in enumerate(factor):
            if same(remaining, 0):
                return tuple(before), factor[i:]
            length = self._length[atom]
            # Equal only by chance (rows and columns cut from one table)? Then the next atom is cut at length 0: exact for all sizes.
            if same(remaining, length) or not self.sizes.less(remaining, length, (atom,)):
                before.append(atom)
                remaining = minus(remaining, length)
                continue
            if factor.count(atom) > 1:
                return None
            head, tail = self._cut(atom, remaining)
            return (*before, head), (tail, *factor[i + 1 :])
        return (tuple(before), ()) if same(remaining, 0) else None
