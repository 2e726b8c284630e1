"""What a pin demands of the labels: the atoms that are sharded behind a marker."""

from __future__ import annotations

from torch.fx import Node

from seqpar.partitioner.candidates import heaviest_factor
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.lengths import minus, same
from seqpar.partitioner.marker import is_marker, pin_of
from seqpar.partitioner.op import as_length


def is_pin(node: Node) -> bool:
    """A marker that says more than a name."""
    return is_marker(node) and pin_of(node).pinned


def kept_atoms(inference: Inference, node: Node) -> tuple[int, ...] | None:
    """Atoms of the first `keep` positions of a split pin; None if no boundary between atoms is there."""
    pin = pin_of(node)
    if pin.keep is None:
        return ()
    axis = inference.axis(node, pin.split)  # type: ignore[arg-type]
    sizes, remaining = inference.table.sizes, as_length(pin.keep)
    if same(remaining, 0):
        return ()
    if len(axis) != 1:
        return None
    kept: list[int] = []
    for atom in axis[0]:
        kept.append(atom)
        length = inference.table.length(atom)
        if sizes.hint(length) >= sizes.hint(remaining):
            return tuple(kept) if sizes.equal(length, remaining, (atom,)) else None
        remaining = minus(remaining, length)
    return None


def pinned_atoms(inference: Inference, node: Node) -> list[int]:
    """Atoms that a split pin wants sharded, in order: the sequence in its dim, but for what it keeps."""
    pin = pin_of(node)
    if pin.split is None:
        return []
    kept = kept_atoms(inference, node) or ()
    return [a for a in heaviest_factor(inference, inference.axis(node, pin.split)) if a not in kept]
