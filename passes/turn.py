"""Emit a switch: a value sharded along one factor becomes sharded along another, by one all-to-all.

Before: %x sharded along frames [F/N, S, C], read along rows
After:  %x_s = switch(%x, 0, frame parts, 1, row parts, group="sp")        [F, S/N, C]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from seqpar.partitioner.layout import Layout
from seqpar.runtime.switch import switch

if TYPE_CHECKING:
    from seqpar.passes.emit import Emitter

aten = torch.ops.aten
Place = tuple[int, int]
"""A dim, and a factor of its axis."""


def switch_places(emitter: Emitter, node: Node, have: Layout, want: Layout) -> tuple[Place, Place] | None:
    """Where the cut is and where it goes; None if either is not in exactly one factor, or both are in the same."""
    table = emitter.view.inference.table
    axes = [table.expand_axis(axis) for axis in emitter.view.inference.axes[node][0]]
    found = []
    for layout in (have, want):
        places = [(d, i) for d, axis in enumerate(axes) for i, f in enumerate(axis) if layout[d] & set(f)]
        if len(places) != 1:
            return None
        found.append(places[0])
    return None if found[0] == found[1] else (found[0], found[1])


def emit_switch(emitter: Emitter, node: Node, x: Node, have: Layout, want: Layout, places: tuple[Place, Place]) -> Node:
    """`x` in the layout `want`. Dims that are products are laid open by a view around the exchange."""
    view, emit = emitter.view, emitter.sizes.emit
    axes = [view.inference.table.expand_axis(axis) for axis in view.inference.axes[node][0]]
    opened = {d for d, _ in places if len(axes[d]) > 1}
    shape: list[Any] = []
    index: dict[Place, int] = {}
    for d, axis in enumerate(axes):
        for i, factor in enumerate(axis) if d in opened else [(0, None)]:
            index[d, i] = len(shape)
            shape.append(emit(emitter.local_length(node, d, axis, have[d]) if factor is None else view.factor_length(factor, have[d])))
    source, target = places

    def parts(place: Place, layout: Layout) -> tuple[Any, ...]:
        return emitter.segments(axes[place[0]][place[1]], layout[place[0]])

    if opened:
        x = emitter.call(aten.reshape.default, (x, shape))
    done = emitter.call(switch, (x, index[source], parts(source, have), index[target], parts(target, want)), {"group": "sp"})
    if not opened:
        return done
    return emitter.call(aten.reshape.default, (done, [emit(emitter.local_length(node, d, axis, want[d])) for d, axis in enumerate(axes)]))
