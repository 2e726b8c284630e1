"""A causal ring in zigzag order in integers: what every rank of it receives and attends, with what `runtime/zigzag.py` does.

parts: how many positions of the one sequence every ring rank holds. Of the halves of all parts, 2N chunks, rank r holds 2r and 2r + 1, and attends
r and 2N - 1 - r.
"""

from __future__ import annotations

from collections.abc import Sequence


def _chunks(parts: Sequence[int]) -> list[int]:
    return [n for part in parts for n in ((part + 1) // 2, part // 2)]


def _attended(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def dealt(parts: Sequence[int]) -> list[int]:
    """How many positions every rank attends."""
    chunks = _chunks(parts)
    return [sum(chunks[c] for c in _attended(r, len(parts))) for r in range(len(parts))]


def arriving(parts: Sequence[int]) -> tuple[list[int], list[int]]:
    """How many positions every rank receives from others on the way there, and back."""
    chunks = _chunks(parts)
    both = [sum(chunks[c] for c in _attended(r, len(parts)) if c // 2 == r) for r in range(len(parts))]
    return [n - own for n, own in zip(dealt(parts), both, strict=True)], [n - own for n, own in zip(parts, both, strict=True)]


def visible_pairs(parts: Sequence[int]) -> list[int]:
    """How many pairs of query and key every rank computes."""
    chunks, lengths, size = _chunks(parts), dealt(parts), len(parts)
    return [n * (n + 1) // 2 + n * sum(chunks[:r]) + chunks[2 * size - 1 - r] * sum(lengths[r + 1 :]) for r, n in enumerate(lengths)]


def plain_pairs(parts: Sequence[int]) -> list[int]:
    """The same when every rank keeps its contiguous part."""
    return [n * (n + 1) // 2 + n * sum(parts[:r]) for r, n in enumerate(parts)]
