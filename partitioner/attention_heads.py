"""Division of attention heads over the Ulysses ranks, exactly, for every number of heads."""

from __future__ import annotations

from dataclasses import dataclass

from seqpar.partitioner.lengths import part


@dataclass(frozen=True)
class HeadPlan:
    """queries / keys: (start, stop) heads per rank; `keys` may overlap when a group of query heads is divided.

    expansion: per rank, which received K/V head each local query head reads, or None if plain grouping does it;
    grouped: True if the local attention has fewer K/V heads than query heads on ranks without an expansion.
    """

    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]
    expansion: tuple[tuple[int, ...] | None, ...]
    grouped: bool


def busiest_heads(heads: int, ranks: int) -> int:
    """Whole heads of the rank that has most of them."""
    return int(part(heads, 0, ranks))


def divide_heads(query_heads: int, key_heads: int, ranks: int) -> HeadPlan:
    """Contiguous query heads per rank (the first ranks hold one more), and the K/V heads they read."""
    group = query_heads // key_heads
    queries, keys, expansion = [], [], []
    start = 0
    for rank in range(ranks):
        stop = start + int(part(query_heads, rank, ranks))
        first, last = start // group, -(-stop // group)
        queries.append((start, stop))
        keys.append((first, last))
        reads = tuple(h // group - first for h in range(start, stop))
        regular = (stop - start) % (last - first) == 0 and reads == tuple(i // ((stop - start) // (last - first)) for i in range(stop - start))
        expansion.append(None if regular else reads)
        start = stop
    return HeadPlan(tuple(queries), tuple(keys), tuple(expansion), grouped=group > 1)
