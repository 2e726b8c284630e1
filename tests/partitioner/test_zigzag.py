"""What a ring in zigzag order costs, in integers: the same chunks that the runtime deals."""

import pytest

from seqpar.partitioner.zigzag import dealt, pieces, plain_pairs, visible_pairs
from seqpar.runtime import zigzag
from seqpar.runtime.layout import parts_of

PARTS = [(4, 4), (7, 6), parts_of(23, 3), parts_of(29, 4), parts_of(3, 4), (5, 0, 1, 2), (9,), (0, 0, 3)]


@pytest.mark.parametrize("parts", PARTS)
def test_chunks_are_those_of_the_runtime(parts):
    size, chunks = len(parts), zigzag.chunk_lengths(parts)
    assert dealt(parts) == zigzag.dealt(parts) and [list(p) for p in pieces(parts)] == zigzag.pieces(chunks, 1)
    assert sum(dealt(parts)) == sum(parts) and len(pieces(parts)) == size


@pytest.mark.parametrize("parts", PARTS)
def test_pairs_by_counting_them(parts):
    """A row sees itself and all before it."""
    size, chunks = len(parts), zigzag.chunk_lengths(parts)
    starts = [sum(chunks[:c]) for c in range(2 * size + 1)]

    def seen(chunk):
        return sum(row + 1 for row in range(starts[chunk], starts[chunk + 1]))

    assert visible_pairs(parts) == [sum(map(seen, zigzag.attended(r, size))) for r in range(size)]
    assert plain_pairs(parts, True) == [seen(2 * r) + seen(2 * r + 1) for r in range(size)]


def test_pairs_of_a_ring_of_several_stretches():
    """Its own ones are a triangle; of every other rank's block something is visible, so all of it is computed under a mask."""
    assert plain_pairs((3, 2), False) == [6 + 3 * 2, 3 + 2 * 3]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_work_is_even(size):
    parts = parts_of(1000, size)
    assert max(visible_pairs(parts)) <= 1.01 * 1000 * 1001 / 2 / size
