"""Rows of the neighbours, and windows of a whole value: what a convolution over a sharded dim needs besides its own part."""

import torch
from torch import Tensor

from seqpar.runtime.groups import Group, rank_of, size_of, start_all_to_all, wait
from seqpar.runtime.wire import from_wire, pack, to_wire, unpack, with_dim


def halo(x: Tensor, dim: int, before: int, after: int, *, group: Group, edges: bool = False) -> Tensor:
    """Local [.., n, ..] -> [.., before + n + after, ..]: the neighbours' last `before` and first `after` positions; at both ends zeros, or the position there (`edges`).

    Parts lie in rank order; every part has at least max(before, after) positions. One all-to-all between neighbours.
    """
    size, rank = size_of(group), rank_of(group)
    wire = to_wire(x)
    first, last = wire.narrow(dim, 0, after), wire.narrow(dim, wire.shape[dim] - before, before)
    in_sizes, out_sizes, pieces, shapes = [0] * size, [0] * size, [], []
    if rank > 0:  # the left neighbour gets our first rows and sends its last ones
        in_sizes[rank - 1], out_sizes[rank - 1] = first.numel(), last.numel()
        pieces.append(([first], 0))
        shapes.append(with_dim(wire.shape, dim, before))
    if rank + 1 < size:
        in_sizes[rank + 1], out_sizes[rank + 1] = last.numel(), first.numel()
        pieces.append(([last], 0))
        shapes.append(with_dim(wire.shape, dim, after))
    received = iter(unpack(wait(start_all_to_all(pack(pieces, wire), out_sizes, in_sizes, group)), shapes))
    left = next(received) if rank > 0 else _end(wire, dim, 0, before, edges)
    right = next(received) if rank + 1 < size else _end(wire, dim, wire.shape[dim] - 1, after, edges)
    return from_wire(torch.cat([left, wire, right], dim), x.dtype)


def _end(x: Tensor, dim: int, position: int, length: int, edges: bool) -> Tensor:
    shape = with_dim(x.shape, dim, length)
    return x.narrow(dim, position, 1).expand(shape) if edges else x.new_zeros(shape)


def window(x: Tensor, dim: int, start: int, stop: int, edges: bool = False) -> Tensor:
    """[.., n, ..] -> [.., stop - start, ..]: positions start..stop of a whole value, zeros before its first and after its last one, or these repeated (`edges`)."""
    first, last = (min(max(position, 0), x.shape[dim]) for position in (start, stop))
    inside = x.narrow(dim, first, last - first)
    if last - first == stop - start:
        return inside
    before = min(max(-start, 0), stop - start)
    left, right = (_end(x, dim, at, n, edges) for at, n in ((0, before), (x.shape[dim] - 1, stop - start - before - (last - first))))
    return torch.cat([left, inside, right], dim)
