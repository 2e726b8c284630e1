"""Ring attention: queries stay, blocks of keys and values travel from neighbour to neighbour.

Shapes: B batch, H and Hk heads, Sq_r / Sk_r what rank r of the ring holds, D head dim.
`query_segments` / `key_segments` (see `layout`) describe the global order; entries of tuples are ring ranks.
"""

from __future__ import annotations  # inner functions are compiled: theirs must not be evaluated

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.errors import UnsupportedError
from seqpar.runtime.attention import Partial, attend, causal_mask, merge, nothing_seen
from seqpar.runtime.groups import Group, rank_of, size_of, start_all_gather, start_ring_exchange, wait
from seqpar.runtime.layout import Range, Segments, any_sharded, global_ranges, local_ranges, sharded_only, take, total
from seqpar.runtime.travel import Form
from seqpar.runtime.wire import Block, joined, pack, unpack

ABSORBS = -5e8
"""Adding a bias below this to a score gives the bias back in float32."""


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    query_segments: Segments,
    key_segments: Segments,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    group: Group,
    comm_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention of the local q [B, H, Sq_r, D] to all keys, of which k, v [B, Hk, Sk_r, D] are here; like q.

    Int key segments (held by every rank) are attended once, together with the own block; tuple segments
    rotate, the next block in flight while the current one computes. Any part may be empty.
    mask: the *global* mask, boolean or additive, broadcastable to [B, H, Sq, Sk]. `is_causal`: global positions.
    Blocks are merged in rotation order, so the rows of int query segments differ between ranks in the last bits;
    `split_kv_attention` is the bit-identical way. `comm_dtype`: what blocks of other ranks are rounded to (`travel.py`), once, by their owner.
    """
    size, rank = size_of(group), rank_of(group)
    assert mask is None or not is_causal, "mask and is_causal exclude each other"
    rule = _Visibility.of(mask, is_causal, scale, enable_gqa, global_ranges(query_segments, rank))
    key_ranges = global_ranges(key_segments, rank)
    if size == 1 or not any_sharded(key_segments):
        return _finish(rule.attend(q, k, v, key_ranges), q, v)
    travelling = [sharded_only(key_segments, global_ranges(key_segments, r)) for r in range(size)]

    def visit(result: Partial | None, source: int, k: Tensor, v: Tensor) -> Partial | None:
        partial = rule.attend(q, k, v, key_ranges if source == rank else travelling[source])
        if partial is None:
            return result
        return partial if result is None else merge(*result, *partial)

    own = sharded_only(key_segments, local_ranges(key_segments, rank))
    result = rotate(k, v, own, [total(ranges) for ranges in travelling], visit, group, comm_dtype)
    return refuse_gradients(_finish(result, q, v))


def rotate(
    k: Tensor,
    v: Tensor,
    own: Sequence[Range],
    lengths: Sequence[int],
    visit: Callable[[Any, int, Tensor, Tensor], Any],
    group: Group,
    comm_dtype: torch.dtype | None = None,
) -> Any:
    """Show every rank's keys and values to `visit(result, source, k, v) -> result`, first the own ones; returns the last result.

    own: the ranges of the local k, v [B, H, S_r, D] that travel; lengths: how many positions each rank sends around. The block
    that is attended next is in flight meanwhile, the first one before anything is attended.
    """
    size, rank = size_of(group), rank_of(group)
    form = Form.of(k.dtype, 2, comm_dtype)
    block, result = _pack_block(k, v, own, form), None
    for step in range(size):
        source, pending = (rank - step) % size, None
        if step + 1 < size:
            shapes = _block_shapes(k, v, lengths[(source - 1) % size], form)
            pending = start_ring_exchange(block, sum(math.prod(shape) for shape in shapes), group)
        result = visit(result, source, k, v)
        if pending is not None:
            block = wait(pending)
            *header, k, v = unpack(block, shapes)
            k, v = (x.to(form.dtype).transpose(1, 2) for x in form.decode([k, v], header[0] if header else None))
    return result


def split_kv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    query_segments: Segments,
    key_segments: Segments,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    group: Group,
) -> Tensor:
    """`ring_attention` for queries that every rank holds whole (all `query_segments` are ints).

    Every rank attends to its own keys; the partial results are all-gathered and merged in rank order, so the
    result [B, H, Sq, D] has the same bits on every rank. Int key segments are attended by the last rank.
    """
    size, rank = size_of(group), rank_of(group)
    assert not any_sharded(query_segments), f"queries must be whole on every rank: {query_segments}"
    assert mask is None or not is_causal, "mask and is_causal exclude each other"
    rule = _Visibility.of(mask, is_causal, scale, enable_gqa, global_ranges(query_segments, rank))
    key_ranges = global_ranges(key_segments, rank)
    if size == 1 or not any_sharded(key_segments):
        return _finish(rule.attend(q, k, v, key_ranges), q, v)
    if rank != size - 1:  # the last rank has the smallest parts
        local = sharded_only(key_segments, local_ranges(key_segments, rank))
        k, v = _join(k, local), _join(v, local)
        key_ranges = sharded_only(key_segments, key_ranges)
    out, lse = rule.attend(q, k, v, key_ranges) or nothing_seen(q, v)
    out, lse = out.to(lse.dtype), lse.unsqueeze(-1)
    wire = wait(start_all_gather(pack([([out], 0), ([lse], 0)], out), group))
    parts = unpack(wire, [out.shape, lse.shape] * size)
    result = parts[0], parts[1].squeeze(-1)
    for r in range(1, size):
        result = merge(*result, parts[2 * r], parts[2 * r + 1].squeeze(-1))
    return refuse_gradients(result[0].to(q.dtype))


@dataclass(frozen=True)
class _Visibility:
    """Which of this rank's queries see which keys, and how they are attended."""

    mask: Tensor | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    query_ranges: list[Range]
    floor: Tensor | None
    """The largest bias of each row over all keys, [B|1, H|1, Sq|1, 1]; None without a bias."""

    @staticmethod
    def of(mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool, query_ranges: list[Range]) -> _Visibility:
        mask, floor = None if mask is None else mask[(None,) * (4 - mask.ndim)], None
        if mask is not None and mask.dtype != torch.bool:
            floor = (_join(mask, query_ranges, 2) if mask.shape[2] != 1 else mask).amax(-1, keepdim=True)
        return _Visibility(mask, is_causal, scale, enable_gqa, query_ranges, floor)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_ranges: list[Range]) -> Partial | None:
        """Attention to the keys at these global positions; None when no query sees any of them."""
        if total(key_ranges) == 0 or total(self.query_ranges) == 0:
            return None
        if self.mask is not None:
            seen = self._local_mask(self.mask, key_ranges)
            out, lse = attend(q, k, v, seen, self.scale, self.enable_gqa)
            return out, lse if seen.dtype == torch.bool else self._count_absorbed(lse, seen, total(key_ranges))
        if not self.is_causal:
            return attend(q, k, v, None, self.scale, self.enable_gqa)
        if key_ranges == self.query_ranges:  # any such pair is lower triangular, and kernels know that shape
            return attend(q, k, v, None, self.scale, self.enable_gqa, is_causal=True)
        (first_query, last_query), (first_key, last_key) = _extent(self.query_ranges), _extent(key_ranges)
        if first_key > last_query:
            return None
        mask = None if last_key <= first_query else causal_mask(self.query_ranges, key_ranges, q.device)
        return attend(q, k, v, mask, self.scale, self.enable_gqa)

    def _count_absorbed(self, lse: Tensor, mask: Tensor, keys: int) -> Tensor:
        """Rows that see nothing but finite "minus infinity": the bias absorbs the scores, every such key weighs the same, and `lse` has no
        digits left to say how many there are. Their number is what one process weighs this block with.
        """
        assert self.floor is not None, "a bias has one"
        count = (mask == self.floor).sum(-1) * (keys if mask.shape[-1] == 1 else 1)
        floor = self.floor.squeeze(-1)
        return torch.where((floor < ABSORBS) & (floor > -math.inf), count.to(lse.dtype).log(), lse)

    def _local_mask(self, mask: Tensor, key_ranges: list[Range]) -> Tensor:
        for dim, ranges in ((2, self.query_ranges), (3, key_ranges)):
            if mask.shape[dim] != 1:  # else broadcast
                mask = _join(mask, ranges, dim)
        return mask


def _pack_block(k: Tensor, v: Tensor, ranges: Sequence[Range], form: Form) -> Tensor:
    """K, then V, each as [B, S, H, D]: the memory order the projections produce."""
    sent, header = form.encode([k.transpose(1, 2), v.transpose(1, 2)])
    blocks: list[Block] = [(header, 0)] if header else []
    return pack([*blocks, *((take(x, 1, ranges), 1) for x in sent)], sent[0], dtype=form.wire)


def _block_shapes(k: Tensor, v: Tensor, length: int, form: Form) -> list[list[int]]:
    return [*([[form.header]] if form.header else []), *([x.shape[0], length, x.shape[1], x.shape[3]] for x in (k, v))]


def _join(x: Tensor, ranges: Sequence[Range], dim: int = 2) -> Tensor:
    return joined(take(x, dim, ranges), dim)


def _extent(ranges: Sequence[Range]) -> tuple[int, int]:
    """First and last position of the non-empty ranges."""
    kept = [(start, start + length - 1) for start, length in ranges if length > 0]
    return kept[0][0], kept[-1][1]


def _finish(partial: Partial | None, q: Tensor, v: Tensor) -> Tensor:
    out, _ = nothing_seen(q, v) if partial is None else partial
    return out.to(q.dtype)


def refuse_gradients(out: Tensor) -> Tensor:
    """Kernels give no gradient for the log-sum-exp: make `backward` through a merge an error, not a wrong number."""
    if out.requires_grad and not torch.compiler.is_compiling():
        out.register_hook(_raise_no_gradient)
    return out


def _raise_no_gradient(_: Tensor) -> None:
    raise UnsupportedError("no gradient passes through ring attention yet: run under torch.no_grad(), or use ulysses only")
