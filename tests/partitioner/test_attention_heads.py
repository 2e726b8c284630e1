"""Heads over ranks: every query head once, and beside it the K/V head it reads."""

import pytest

from seqpar.partitioner.attention_heads import divide_heads


@pytest.mark.parametrize(("queries", "keys", "ranks"), [(q, k, n) for q in range(1, 14) for k in range(1, q + 1) if q % k == 0 for n in range(1, min(q, 7) + 1)])
def test_all_heads(queries, keys, ranks):
    plan = divide_heads(queries, keys, ranks)
    group = queries // keys
    assert [h for start, stop in plan.queries for h in range(start, stop)] == list(range(queries))
    sizes = [stop - start for start, stop in plan.queries]
    assert max(sizes) - min(sizes) <= 1
    for (start, stop), (first, last), index in zip(plan.queries, plan.keys, plan.expansion, strict=True):
        assert 0 <= first < last <= keys
        held = list(range(first, last))
        read = [h // group for h in range(start, stop)]
        assert set(read) == set(held), "no head is sent that nobody reads"
        if index is None:  # torch's grouping: equal runs of query heads
            run = (stop - start) // len(held)
            assert run * len(held) == stop - start and [held[i // run] for i in range(stop - start)] == read
        else:
            assert [held[i] for i in index] == read
    assert plan.grouped == (group > 1)
