"""Ranks that share one count have the same count."""

import pytest

from seqpar.models import registry
from seqpar.passes.count import count
from seqpar.passes.pipeline import partition
from seqpar.passes.plan_of import example_of
from seqpar.passes.trace import trace


@pytest.mark.parametrize(("name", "heads"), [("flux", 5), ("bagel", 6)])
def test_shared_counts_are_those_of_each_rank(name: str, heads: int) -> None:
    family = registry.get(name)
    config = family.tiny_config(heads=heads, layers=1)
    inputs = family.grid_inputs(config, rows=3, columns=7, text_len=11, device="meta")
    traced = trace(family.build(config, device="meta"), (), inputs, dynamic=False)
    for ulysses, ring in ((2, 2), (4, 1), (1, 4), (3, 2)):
        partitioned = partition(traced, ulysses=ulysses, ring=ring)
        example = example_of(partitioned)
        single = [count(partitioned.program(r), example, ulysses=ulysses, ring=ring, rank=r) for r in range(ulysses * ring)]
        shared = partitioned.counts
        assert [c.total_flops for c in shared] == [c.total_flops for c in single]
        assert [c.traffic for c in shared] == [c.traffic for c in single]
