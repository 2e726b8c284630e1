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
    """Contiguous query heads per rank (the first ranks hold one more), and the K/V heads they read; at least one head per rank."""
    group = query_heads // key_heads
    stops = [sum(int(part(query_heads, r, ranks)) for r in range(rank + 1)) for rank in range(ranks)]
    queries = tuple(zip([0, *stops[:-1]], stops, strict=True))
    read = [keys_of(start, stop, group) for start, stop in queries]
    return HeadPlan(queries, tuple((first, last) for first, last, _ in read), tuple(index for *_, index in read), grouped=group > 1)


def keys_of(start: int, stop: int, group: int) -> tuple[int, int, tuple[int, ...] | None]:
    """K/V heads [first, last) that query heads [start, stop) read, and which of these each one reads; None if they are equal runs."""
    first, last = start // group, -(-stop // group)
    reads = tuple(h // group - first for h in range(start, stop))
    run = (stop - start) // (last - first)
    regular = run * (last - first) == stop - start and reads == tuple(i // run for i in range(stop - start))
    return first, last, None if regular else reads
