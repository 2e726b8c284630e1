"""Infer + solve + rewrite stays far below the trace, and linear in the number of blocks; a second start does neither.

The figures for 10, 20, 40 and 57 full-size blocks: `python -m seqpar.tools.compile_time`.
"""

from unittest import mock

import pytest

from seqpar.models import registry
from seqpar.passes import pipeline
from seqpar.passes.trace import trace
from seqpar.tools.compile_time import measure


@pytest.mark.parametrize(("layers", "times"), [(1, 3), (14, 1)])
def test_another_cut_of_a_grid_is_tried_where_it_may_pay(layers: int, times: int) -> None:
    """Of a deep model the ends, where cuts differ, are less than what makes a cut clearly cheaper."""
    family = registry.get("wan")
    settings = family.with_layers(family.full, layers)
    traced = trace(family.build(settings, device="meta"), (), family.native_inputs(settings, device="meta"), dynamic=False)
    with mock.patch.object(pipeline, "infer", side_effect=pipeline.infer) as infer, mock.patch.object(pipeline, "solve", side_effect=pipeline.solve) as solve:
        pipeline.partition(traced, ulysses=2)
    assert (infer.call_count, solve.call_count) == (times, times)


def test_linear_in_blocks() -> None:
    timings = [measure("flux", n, ulysses=4, ring=2, full=False, repeats=2) for n in (6, 12, 24)]
    assert all(t.compile <= 0.5 * t.trace for t in timings), timings
    per_block = [t.per_block for t in timings]
    assert max(per_block) <= 1.5 * min(per_block), timings


def test_a_second_start(capsys: pytest.CaptureFixture[str]) -> None:
    timing = measure("wan", 8, ulysses=2, ring=2, full=False, repeats=1, second=True)
    assert timing.second is not None and timing.second < 0.3 * timing.total, timing
    assert 0.5 * timing.trace < timing.operators < timing.trace, timing
    published = measure("flux", ulysses=1, ring=1, full=False, repeats=1)
    assert published.blocks == 4 and published.second is None and published.total > published.trace
