"""Sequence layouts: a dim is a row of segments, each kept whole or cut into one contiguous part per rank.

`Segments`, in global order: an int is a segment every rank holds whole, of that length; a tuple holds the
lengths of the parts of a sharded one, one entry per rank of the group, in rank order (0 is legal).
The local dim is the concatenation of what the rank holds of every segment.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar.compat import sym_max
from seqpar.runtime.groups import Group, rank_of, size_of, start_all_gather, wait
from seqpar.runtime.wire import from_wire, joined, pack, to_wire, unpack, with_dim

Segment = int | tuple[int, ...]
Segments = Sequence[Segment]
Range = tuple[int, int]
"""Start and length."""


def parts_of(length: int, size: int) -> tuple[int, ...]:
    """The usual parts of a sharded segment over `size` ranks: contiguous, as equal as possible, longer ones first."""
    return tuple((length + size - 1 - rank) // size for rank in range(size))


def is_sharded(segment: Segment) -> bool:
    """Whether the segment is cut into parts."""
    return isinstance(segment, tuple | list)


def any_sharded(segments: Segments) -> bool:
    """Whether any segment is cut into parts."""
    return any(is_sharded(segment) for segment in segments)


def which_travel(segments: Sequence[Segments], size: int) -> list[int]:
    """Which of several tensors, with these segments, an exchange over `size` ranks moves."""
    return [i for i, s in enumerate(segments) if any_sharded(s)] if size > 1 else []


def local_ranges(segments: Segments, rank: int) -> list[Range]:
    """Where each segment, or rank's part of it, lies in the rank's local dim."""
    ranges, start = [], 0
    for segment in segments:
        length = segment[rank] if isinstance(segment, tuple | list) else segment
        ranges.append((start, length))
        start = start + length
    return ranges


def global_ranges(segments: Segments, rank: int) -> list[Range]:
    """Where each segment, or rank's part of it, lies in the global dim."""
    ranges, start = [], 0
    for segment in segments:
        if isinstance(segment, tuple | list):
            ranges.append((start + sum(segment[:rank]), segment[rank]))
            start = start + sum(segment)
        else:
            ranges.append((start, segment))
            start = start + segment
    return ranges


def sharded_only(segments: Segments, ranges: Sequence[Range]) -> list[Range]:
    """The ranges that belong to sharded segments."""
    return [r for segment, r in zip(segments, ranges, strict=True) if is_sharded(segment)]


def part_length(segments: Segments, rank: int) -> int:
    """How many positions of the sharded segments a rank holds."""
    length = 0
    for segment in segments:
        if isinstance(segment, tuple | list):
            length = length + segment[rank]
    return length


def total(ranges: Sequence[Range]) -> int:
    """The summed length of the ranges."""
    return sum(length for _, length in ranges)


def take(x: Tensor, dim: int, ranges: Sequence[Range]) -> list[Tensor]:
    """Views of the ranges of one dim."""
    return [x.narrow(dim, start, length) for start, length in ranges]


def shard(x: Tensor, dim: int, segments: Segments, *, rank: int) -> Tensor:
    """Cut rank's parts out of a dim that holds every segment whole: global [.., S, ..] -> local [.., S_r, ..].

    Pure slicing: a view when one range is left, else one copy.
    """
    return joined(take(x, dim, global_ranges(segments, rank)), dim)


def gather(x: Tensor, dim: int, segments: Segments, *, group: Group) -> Tensor:
    """Make every sharded segment whole again: local [.., S_r, ..] -> [.., S, ..], the same bits on every rank.

    One all-gather whatever the lengths are: shorter parts are padded to the longest in the wire buffer only.
    """
    return gather_many([x], [dim], [segments], group=group)[0]


def start_gather(x: Tensor, dim: int, segments: Segments, *, group: Group) -> Tensor:
    """The 1-D buffer of all ranks' parts, on its way; `finish_gather` reads it. Empty if nothing is sharded."""
    return start_gather_many([x], [dim], [segments], group=group)


def finish_gather(wire: Tensor, x: Tensor, dim: int, segments: Segments, *, group: Group) -> Tensor:
    """Wait for what `start_gather` of the same arguments began: the result of `gather`."""
    return finish_gather_many(wire, [x], [dim], [segments], group=group)[0]


def first_rank(x: Tensor, *, group: Group) -> Tensor:
    """The value that the group's first rank has, on every rank; same shape. Makes values that differ in rounding equal."""
    return finish_first_rank(start_first_rank(x, group=group), x, group=group)


def start_first_rank(x: Tensor, *, group: Group) -> Tensor:
    """The 1-D buffer of all ranks' values, on its way; `finish_first_rank` reads it."""
    return start_all_gather(to_wire(x.contiguous()).reshape(-1), group)


def finish_first_rank(wire: Tensor, x: Tensor, *, group: Group) -> Tensor:
    """Wait for what `start_first_rank` of the same arguments began: the result of `first_rank`."""
    shape = (*x.shape, 2) if x.is_complex() else x.shape
    return from_wire(wait(wire).narrow(0, 0, _numel(shape)).reshape(shape), x.dtype)


def gather_many(
    tensors: Sequence[Tensor], dims: Sequence[int], segments: Sequence[Segments], *, group: Group
) -> list[Tensor]:
    """`gather` for several tensors of one dtype in one collective."""
    wire = start_gather_many(tensors, dims, segments, group=group)
    return finish_gather_many(wire, tensors, dims, segments, group=group)


def start_gather_many(tensors: Sequence[Tensor], dims: Sequence[int], segments: Sequence[Segments], *, group: Group) -> Tensor:
    """The 1-D buffer of all ranks' parts of all tensors, on its way; `finish_gather_many` reads it. Empty if nothing is sharded."""
    size, rank = size_of(group), rank_of(group)
    if size == 1 or not any(any_sharded(s) for s in segments):
        return tensors[0].new_empty(0)
    assert len({x.dtype for x in tensors}) == 1, f"one dtype per gather, got {[x.dtype for x in tensors]}"
    cases = _wire_cases(tensors, dims, segments)
    widest = functools.reduce(sym_max, [sum(_numel(_part_shape(x, dim, s, r)) for x, dim, s in cases) for r in range(size)])
    blocks = [(take(x, dim, sharded_only(s, local_ranges(s, rank))), dim) for x, dim, s in cases if any_sharded(s)]
    return start_all_gather(pack(blocks, cases[0][0], widest), group)


def finish_gather_many(wire: Tensor, tensors: Sequence[Tensor], dims: Sequence[int], segments: Sequence[Segments], *, group: Group) -> list[Tensor]:
    """Wait for what `start_gather_many` of the same arguments began: the result of `gather_many`."""
    size, rank = size_of(group), rank_of(group)
    if size == 1 or not any(any_sharded(s) for s in segments):
        return list(tensors)
    cases = _wire_cases(tensors, dims, segments)
    shapes = [[_part_shape(x, dim, s, r) for x, dim, s in cases] for r in range(size)]
    sizes = [sum(_numel(shape) for shape in row) for row in shapes]
    wire, dtype = wait(wire), tensors[0].dtype
    if _is_result(cases, sizes):
        x, dim, s = cases[0]
        return [from_wire(wire.view(with_dim(x.shape, dim, sum(s[0]))), dtype)]  # type: ignore[arg-type]
    widest = functools.reduce(sym_max, sizes)
    rows = [unpack(wire.narrow(0, r * widest, n), shapes[r]) for r, n in enumerate(sizes)]
    return [
        from_wire(assemble(x, dim, s, [row[i] for row in rows], rank), dtype) if any_sharded(s) else tensors[i]
        for i, (x, dim, s) in enumerate(cases)
    ]


def _wire_cases(tensors: Sequence[Tensor], dims: Sequence[int], segments: Sequence[Segments]) -> list[tuple[Tensor, int, Segments]]:
    return [(to_wire(x), dim % x.ndim, s) for x, dim, s in zip(tensors, dims, segments, strict=True)]


def assemble(x: Tensor, dim: int, segments: Segments, parts: Sequence[Tensor], rank: int) -> Tensor:
    """One copy: the global dim from this rank's local `x` and, per rank, its sharded segments `parts[r]`.

    `parts[rank]` is not read: the rank's own content is taken from `x`.
    """
    local = local_ranges(segments, rank)
    offsets = [0] * len(parts)
    pieces = []
    for segment, (start, length) in zip(segments, local, strict=True):
        if not isinstance(segment, tuple | list):
            pieces.append(x.narrow(dim, start, length))
            continue
        for r, n in enumerate(segment):
            pieces.append(x.narrow(dim, start, n) if r == rank else parts[r].narrow(dim, offsets[r], n))
            offsets[r] = offsets[r] + n
    return joined(pieces, dim)


def _part_shape(x: Tensor, dim: int, segments: Segments, rank: int) -> list[int]:
    return with_dim(x.shape, dim, total(sharded_only(segments, local_ranges(segments, rank))))


def _numel(shape: Sequence[int]) -> int:
    n = 1
    for length in shape:
        n = n * length
    return n


def _is_result(cases: Sequence[tuple[Tensor, int, Segments]], sizes: Sequence[int]) -> bool:
    """Whether the gathered wire buffer already is the result: one even segment, behind leading dims of size 1."""
    if torch.compiler.is_compiling() or len(cases) > 1:  # comparing symbolic lengths would specialise on them
        return False
    x, dim, segments = cases[0]
    return len(segments) == 1 and _numel(x.shape[:dim]) == 1 and len(set(sizes)) == 1
