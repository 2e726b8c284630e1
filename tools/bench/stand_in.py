"""A group of which one rank exists: collectives return at once, with plausible values of the right shapes.

Before: %o = heads_to_seq(%x, ..., group="ulysses")
After:  %g = get_attr[target=stand_in_ulysses]; %o = heads_to_seq(%x, ..., group=%g)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from seqpar.passes.bind import AXES
from seqpar.passes.share import copied, with_graph


class Pool:
    """Where stand-in collectives take what they "receive": one buffer per dtype and device, of normal values where the dtype has them.

    Values matter for time: what a kernel draws in power, hence its clock, depends on them. The buffers are made at the first call and
    grow, so a program must have run once before it is timed. `fresh`: every result has memory of its own instead, as real ones have.
    """

    def __init__(self) -> None:
        self.fresh = False
        self.buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of `shape`, dtype and device as `like`. It is read only."""
        if self.fresh:
            return like.new_empty(shape)
        key, size = (like.dtype, like.device), math.prod(shape)
        if key not in self.buffers or self.buffers[key].numel() < size:
            buffer = like.new_zeros(size)
            self.buffers[key] = buffer.normal_() if like.is_floating_point() else buffer
        return self.buffers[key][:size].view(tuple(shape))


class StandInGroup:
    """`runtime.groups.LocalGroup` of `size` ranks, as `rank` sees it."""

    def __init__(self, size: int, rank: int, pool: Pool) -> None:
        self.size, self.rank, self.pool = size, rank, pool

    def all_to_all(self, flat: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], kind: str) -> Tensor:
        """[sum(in_sizes)] -> [sum(out_sizes)]"""
        return self.pool.take(flat, (sum(out_sizes),))

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ..] -> [size * n, ..]"""
        return self.pool.take(x, (self.size * x.shape[0], *x.shape[1:]))

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        """Same shape."""
        return x.clone()


def stand_ins(ulysses: int, ring: int, rank: int, pool: Pool) -> dict[str, StandInGroup]:
    """Axis name -> the group of `rank` = ring index * ulysses + ulysses index."""
    ring_rank, ulysses_rank = divmod(rank, ulysses)
    places = {"ulysses": (ulysses, ulysses_rank), "ring": (ring, ring_rank), "sp": (ulysses * ring, rank)}
    return {axis: StandInGroup(size, index, pool) for axis, (size, index) in places.items()}


def bind_stand_ins(gm: fx.GraphModule, groups: dict[str, StandInGroup]) -> fx.GraphModule:
    """A copy of the unbound program `gm` that runs in this process alone, as an ordinary module: nothing is interpreted."""
    graph = copied(gm.graph)
    calls = [node for node in graph.nodes if node.op == "call_function" and node.kwargs.get("group") in AXES]
    attributes: dict[str, fx.Node] = {}
    for node in calls:
        axis = node.kwargs["group"]
        if axis not in attributes:
            with graph.inserting_before(next(iter(graph.nodes))):
                attributes[axis] = graph.create_node("get_attr", f"stand_in_{axis}")
        node.update_kwarg("group", attributes[axis])
    return with_graph(gm, graph, {f"stand_in_{axis}": groups[axis] for axis in attributes}, compiled=True)
