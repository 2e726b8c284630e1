"""Counting communication: what one rank receives, without any other rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

KINDS = ("all_to_all", "ring", "all_gather", "all_reduce")


@dataclass(frozen=True)
class Traffic:
    """Bytes received from *other* ranks (wire padding included) and calls made, per kind."""

    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def add(self, kind: str, received: int) -> None:
        """Record one call."""
        self.bytes[kind] += received
        self.calls[kind] += 1

    def include(self, other: "Traffic") -> None:
        """Record all that another has recorded."""
        for mine, its in ((self.bytes, other.bytes), (self.calls, other.calls)):
            for kind in KINDS:
                mine[kind] += its[kind]

    def copy(self) -> "Traffic":
        """The counts as they are now."""
        return Traffic(dict(self.bytes), dict(self.calls))

    def since(self, before: "Traffic") -> "Traffic":
        """What was added after `before` was copied."""
        return Traffic(*({kind: now[kind] - then[kind] for kind in KINDS} for now, then in ((self.bytes, before.bytes), (self.calls, before.calls))))

    def all_to_all(self, flat: Tensor, out_sizes: Sequence[int], rank: int, kind: str) -> None:
        """Record an all-to-all; what a rank sends itself is free."""
        self.add(kind, (sum(out_sizes) - out_sizes[rank]) * flat.element_size())

    def all_gather(self, x: Tensor, size: int) -> None:
        """Record an all-gather."""
        self.add("all_gather", (size - 1) * _nbytes(x))

    def all_reduce(self, x: Tensor, size: int) -> None:
        """Record an all-reduce as its reduce-scatter and all-gather."""
        self.add("all_reduce", 2 * math.ceil(_nbytes(x) * (size - 1) / size))


@dataclass(frozen=True)
class CountingGroup:
    """A group (`groups.LocalGroup`) of one: collectives return empty tensors of the right shape, and are counted.

    Runs one rank's program alone; with meta tensors, without memory or arithmetic. Groups may share `traffic`.
    """

    size: int
    rank: int
    traffic: Traffic = field(default_factory=Traffic)

    def all_to_all(self, flat: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], kind: str) -> Tensor:
        """[sum(in_sizes)] -> [sum(out_sizes)]"""
        assert sum(in_sizes) == flat.shape[0], f"{kind}: sends {in_sizes} of a buffer of {flat.shape[0]}"
        self.traffic.all_to_all(flat, out_sizes, self.rank, kind)
        return flat.new_empty(sum(out_sizes))

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ..] -> [size * n, ..]"""
        self.traffic.all_gather(x, self.size)
        return x.new_empty((self.size * x.shape[0], *x.shape[1:]))

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        """Same shape."""
        self.traffic.all_reduce(x, self.size)
        return x.new_empty(x.shape)


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
