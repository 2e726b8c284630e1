"""A marker is an identity; one that keeps the first positions whole cuts the axis there. What lies behind one may begin with sequences of its own."""

from __future__ import annotations

from seqpar.partitioner.marker import BOUNDARY, pin_of
from seqpar.partitioner.op import Op, as_length
from seqpar.partitioner.registry import rule


@rule(BOUNDARY)
def marker(op: Op) -> None:
    pin = pin_of(op.node)
    if pin.split is not None and pin.keep is not None:
        for factor in op.axis(0, pin.split)[:1]:  # where it cannot be cut, the check of the pins says so
            op.table.sublist(factor, 0, as_length(pin.keep))
    begins = tuple(dim for dim in range(op.rank()) if op.begins(dim))
    for dim in begins:
        op.set_out(dim, op.table.fresh_axis(op.out_shape[dim]))
    op.carry_all(skip=begins)
