"""A causal ring in zigzag order in integers: what every rank of it attends, with what `runtime/zigzag.py` does.

parts: how many positions of the sequence every ring rank holds. It is cut into 2N chunks, as long as halves of these; rank r attends r and 2N - 1 - r.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def _chunks(parts: Sequence[int]) -> list[int]:
    return [n for part in parts for n in ((part + 1) // 2, part // 2)]


def _attended(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def pieces(parts: Sequence[int]) -> tuple[tuple[tuple[int, int, int, int], ...], ...]:
    """Of one head, what every rank attends: heads [start, stop) and rows [start, stop)."""
    ends = list(accumulate(_chunks(parts), initial=0))
    return tuple(tuple((0, 1, ends[c], ends[c + 1]) for c in _attended(r, len(parts))) for r in range(len(parts)))


def dealt(parts: Sequence[int]) -> list[int]:
    """How many positions every rank attends."""
    chunks = _chunks(parts)
    return [sum(chunks[c] for c in _attended(r, len(parts))) for r in range(len(parts))]


def visible_pairs(parts: Sequence[int]) -> list[int]:
    """How many pairs of query and key every rank computes."""
    chunks, lengths, size = _chunks(parts), dealt(parts), len(parts)
    return [n * (n + 1) // 2 + n * sum(chunks[:r]) + chunks[2 * size - 1 - r] * sum(lengths[r + 1 :]) for r, n in enumerate(lengths)]


def plain_pairs(parts: Sequence[int], one_stretch: bool) -> list[int]:
    """The same when every rank keeps its part: one stretch, before which lie those of the ranks before; or several, with a mask over all that others hold."""
    return [n * (n + 1) // 2 + n * (sum(parts[:r]) if one_stretch else sum(parts) - n) for r, n in enumerate(parts)]
