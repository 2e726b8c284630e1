"""Infer + solve + rewrite stays far below the trace, and linear in the number of blocks.

The figures for 10, 20, 40 and 57 full-size blocks: `python -m seqpar.tools.compile_time`.
"""

from seqpar.tools.compile_time import measure


def test_linear_in_blocks() -> None:
    timings = [measure("flux", n, ulysses=4, ring=2, full=False, repeats=2) for n in (6, 12, 24)]
    assert all(t.compile <= 0.5 * t.trace for t in timings), timings
    per_block = [t.per_block for t in timings]
    assert max(per_block) <= 1.5 * min(per_block), timings
