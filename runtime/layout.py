"""Sequence layouts: a dim is a row of segments, each kept whole or cut into one contiguous part per rank.

`Segments`, in global order: an int is a segment every rank holds whole, of that length; a tuple holds the
lengths of the parts of a sharded one, one entry per rank of the group, in rank order (0 is legal).
The local dim is the concatenation of what the rank holds of every segment.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar.runtime.groups import Group, rank_of, size_of, start_all_gather, wait
from seqpar.runtime.wire import from_wire, pack, to_wire, unpack, with_dim

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
    pieces = take(x, dim, global_ranges(segments, rank))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def gather(x: Tensor, dim: int, segments: Segments, *, group: Group) -> Tensor:
    """Make every sharded segment whole again: local [.., S_r, ..] -> [.., S, ..], the same bits on every rank.

    One all-gather whatever the lengths are: shorter parts are padded to the longest in the wire buffer only.
    """
    return gather_many([x], [dim], [segments], group=group)[0]


def first_rank(x: Tensor, *, group: Group) -> Tensor:
    """The value that the group's first rank has, on every rank; same shape. Makes values that differ in rounding equal."""
    wire = to_wire(x.contiguous())
    first = wait(start_all_gather(wire.reshape(-1), group)).narrow(0, 0, wire.numel())
    return from_wire(first.reshape(wire.shape), x.dtype)


def gather_many(
    tensors: Sequence[Tensor], dims: Sequence[int], segments: Sequence[Segments], *, group: Group
) -> list[Tensor]:
    """`gather` for several tensors of one dtype in one collective."""
    size, rank = size_of(group), rank_of(group)
    if size == 1 or not any(any_sharded(s) for s in segments):
        return list(tensors)
    assert len({x.dtype for x in tensors}) == 1, f"one dtype per gather, got {[x.dtype for x in tensors]}"
    dims = [dim % x.ndim for x, dim in zip(tensors, dims, strict=True)]
    xs = [to_wire(x) for x in tensors]
    cases = list(zip(xs, dims, segments, strict=True))
    shapes = [[_part_shape(x, dim, s, r) for x, dim, s in cases] for r in range(size)]
    sizes = [sum(_numel(shape) for shape in row) for row in shapes]
    widest = _max(sizes)
    blocks = [(take(x, dim, sharded_only(s, local_ranges(s, rank))), dim) for x, dim, s in cases if any_sharded(s)]
    wire = wait(start_all_gather(pack(blocks, xs[0], widest), group))
    if _is_result(cases, sizes):
        return [from_wire(wire.view(with_dim(xs[0].shape, dims[0], sum(segments[0][0]))), tensors[0].dtype)]  # type: ignore[arg-type]
    rows = [unpack(wire.narrow(0, r * widest, n), shapes[r]) for r, n in enumerate(sizes)]
    return [
        from_wire(assemble(x, dim, s, [row[i] for row in rows], rank), tensors[i].dtype) if any_sharded(s) else tensors[i]
        for i, (x, dim, s) in enumerate(cases)
    ]


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
    return torch.cat(pieces, dim)


def _part_shape(x: Tensor, dim: int, segments: Segments, rank: int) -> list[int]:
    return with_dim(x.shape, dim, total(sharded_only(segments, local_ranges(segments, rank))))


def _numel(shape: Sequence[int]) -> int:
    n = 1
    for length in shape:
        n = n * length
    return n


def _max(sizes: Sequence[int]) -> int:
    longest = sizes[0]
    for n in sizes[1:]:
        longest = torch.sym_max(longest, n)  # no guard when lengths are symbolic
    return longest


def _is_result(cases: Sequence[tuple[Tensor, int, Segments]], sizes: Sequence[int]) -> bool:
    """Whether the gathered wire buffer already is the result: one even segment, behind leading dims of size 1."""
    if torch.compiler.is_compiling() or len(cases) > 1:  # comparing symbolic lengths would specialise on them
        return False
    x, dim, segments = cases[0]
    return len(segments) == 1 and _numel(x.shape[:dim]) == 1 and len(set(sizes)) == 1
