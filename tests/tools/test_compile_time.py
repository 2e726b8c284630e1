"""Infer + solve + rewrite stays far below the trace, and linear in the number of blocks; a second start does neither.

The figures for 10, 20, 40 and 57 full-size blocks: `python -m seqpar.tools.compile_time`.
"""

import gc
from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import pytest

from seqpar.models import registry
from seqpar.partitioner import infer
from seqpar.passes import pipeline
from seqpar.passes.options import Options
from seqpar.passes.trace import trace
from seqpar.runtime import ring
from seqpar.tools.compile_time import measure


@pytest.fixture(autouse=True)
def _nothing_of_other_tests_is_searched() -> Iterator[None]:
    """A search for garbage among all that earlier tests left takes longer than what is measured here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("layers", "times"), [(1, 3), (14, 1)])
def test_another_cut_of_a_grid_is_tried_where_it_may_pay(layers: int, times: int) -> None:
    """Of a deep model the ends, where cuts differ, are less than what makes a cut clearly cheaper."""
    family = registry.get("wan")
    settings = family.with_layers(family.full if layers > 1 else family.tiny_config(4, 1), layers)
    inputs = family.native_inputs(settings, device="meta") if layers > 1 else family.grid_inputs(settings, rows=16, columns=16, text_len=32, device="meta")
    traced = trace(family.build(settings, device="meta"), (), inputs, dynamic=False)
    with mock.patch.object(pipeline, "infer", side_effect=pipeline.infer) as inferred, mock.patch.object(pipeline, "solve", side_effect=pipeline.solve) as solved:
        pipeline.partition(traced, ulysses=2)
    assert (inferred.call_count, solved.call_count) == (times, times)


def test_linear_in_blocks() -> None:
    """Against a trace in which every block runs; one that copies those that are alike takes less."""
    timings = [measure("flux", n, ulysses=4, ring=2, full=False, repeats=2, every_block=True) for n in (6, 12, 24)]
    assert all(t.compile <= 0.3 * t.trace for t in timings), timings
    copied = measure("flux", 24, ulysses=4, ring=2, full=False, repeats=1)
    assert copied.nodes == timings[-1].nodes and copied.trace < 0.8 * timings[-1].trace, (copied, timings)
    assert all(later.per_block <= 1.5 * earlier.per_block for earlier, later in pairwise(timings)), timings


def test_what_runs_per_block() -> None:
    """Counted, not timed: looked at one by one, every block costs as many rules as the one before, and counting a program runs an attention once, however many blocks have one like it."""
    family, rules, rings = registry.get("wan"), [], []
    for layers in (2, 3, 4):
        settings = family.with_layers(family.tiny_config(heads=8), layers)
        traced = trace(family.build(settings, device="meta"), (), family.grid_inputs(settings, rows=16, columns=16, text_len=32, device="meta"), dynamic=False)
        with mock.patch.object(infer, "_read_call", side_effect=infer._read_call) as read, mock.patch.object(ring, "rotate", side_effect=ring.rotate) as rotated:
            partitioned = pipeline.partition(traced, ulysses=2, ring=2, options=Options(grids=False, repeats=False))
            partitioned.program(0)
        around = [node.name for node in partitioned.emitted(0).graph.nodes if node.target is ring.ring_attention]
        assert len(around) == layers and len({partitioned.counts[0].flops[name] for name in around}) == 1
        assert {tuple(partitioned.counts[0].received[name].bytes.values()) for name in around} != {(0,) * 4}, "what was remembered is counted again"
        rules.append(read.call_count)
        rings.append(rotated.call_count)
    assert rules[2] - rules[1] == rules[1] - rules[0] > 0, rules
    assert rings == [1, 1, 1], rings


def test_a_second_start(capsys: pytest.CaptureFixture[str]) -> None:
    timing = measure("wan", 8, ulysses=2, ring=2, full=False, repeats=1, second=True)
    assert timing.second is not None and timing.second < 0.3 * timing.total, timing
    assert 0.5 * timing.trace < timing.operators < timing.trace, timing
    published = measure("flux", ulysses=1, ring=1, full=False, repeats=1)
    assert published.blocks == 4 and published.second is None and published.total > published.trace
