"""Dims that strides shorten, read as products: of `n x 2` positions a stride of 2 leaves n, and parts of n lie on the same ranks as before.

A dim gets its axis where it begins, and what shortens it comes later. So a reading of the graph asks, and the next one begins these dims as products (`infer`):

    first    [1, 3, 128]  conv, stride 2  [1, 8, 64]  conv, stride 2  [1, 8, 32]        128: one atom, 64: another, 32: a third
    second   [1, 3, 32x2x2]               [1, 8, 32x2]                [1, 8, 32]        all are cut where the 32 positions are
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import sympy

from seqpar.partitioner.atoms import AtomTable, Axis
from seqpar.partitioner.lengths import Length, fraction, same

Site = tuple[str, int, int]  # node, output, dim
SHORT = 16  # fewer positions are fewer than the ranks may be: a dim of so few can be cut better as a sequence of its own


@dataclass(frozen=True)
class Ask:
    """The positions of an atom should be those of `shorter`, `stride` for each."""

    atom: int
    shorter: Axis
    stride: int


@dataclass
class Shortened:
    """What one reading of a graph knows (`strides`: of each dim that begins as a product, outermost first) and what it asks for.

    begun: the axis of every dim that begins somewhere. inner: the atoms of the strides.
    """

    strides: dict[Site, tuple[int, ...]] = field(default_factory=dict)
    begun: dict[Site, Axis] = field(default_factory=dict)
    asks: list[Ask] = field(default_factory=list)
    inner: set[int] = field(default_factory=set)

    def begin(self, table: AtomTable, site: Site, length: Length) -> Axis:
        """The axis of a dim that is made of nothing known."""
        strides = self.strides.get(site)
        axis = table.fresh_axis(length) if strides is None else self._product(table, length, strides)
        self.begun[site] = axis
        return axis

    def _product(self, table: AtomTable, length: Length, strides: tuple[int, ...]) -> Axis:
        outermost, inner = table.fresh_axis(fraction(length, 1, math.prod(strides))), tuple(factor for n in strides for factor in table.fresh_axis(n))
        self.inner.update(a for factor in inner for a in factor)
        axis = (*outermost, *inner)
        table.sizes.equal(length, table.axis_length(axis), table.roots(outermost))
        return axis

    def answered(self, table: AtomTable) -> dict[Site, tuple[int, ...]]:
        """The strides with which the next reading should begin: those of this one, and what it asks for."""
        asked: dict[int, Ask] = {}
        for ask in self.asks:
            root = table.expand((ask.atom,))
            if len(root) == 1 and (root[0] not in asked or asked[root[0]].stride < ask.stride):
                asked[root[0]] = ask
        found = dict(self.strides)
        for site, axis in self.begun.items():
            outermost = table.expand(axis[0]) if axis else ()
            if len(outermost) == 1 and (strides := _strides(table, asked, outermost[0])):
                found[site] = (*strides, *self.strides.get(site, ()))
        return found


def _strides(table: AtomTable, asked: dict[int, Ask], atom: int) -> tuple[int, ...]:
    """By what the atom is shortened in the end, the last stride first."""
    ask = asked.get(atom)
    if ask is None:
        return ()
    outermost = table.expand_axis(ask.shorter)[0]
    after = _strides(table, asked, outermost[0]) if len(outermost) == 1 else ()
    return (*after, *sympy.factorint(ask.stride, multiple=True))


def left_by(table: AtomTable, axis: Axis, stride: int) -> Axis | None:
    """The product without its innermost factors, if those are `stride` positions together."""
    inner: Length = 1
    for kept in range(len(axis) - 1, 0, -1):
        inner = inner * table.factor_length(axis[kept])
        if same(inner, stride):
            return axis[:kept]
    return None
