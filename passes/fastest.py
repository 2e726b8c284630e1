"""At real rates: of programs whose prices are close, the one that takes least time.

The solver adds up what is computed and what travels. How much of that travels while the rank computes is known only once a program is written and
its exchanges are put behind work (`schedule.py`); so the programs of the ranks that may be busiest are written, and replayed (`timeline.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from seqpar.partitioner.solve import Solution
from seqpar.passes.plan_of import counts_of
from seqpar.passes.timeline import timeline

if TYPE_CHECKING:
    from seqpar.passes.pipeline import Partitioned

CLEARLY = 0.995  # of the time of the cheapest one: predictions are no better than that
WHY = "more of it travels behind work than of what is cheapest"


def fastest(programs: Callable[[Solution], Partitioned], solution: Solution) -> Partitioned:
    """The programs of `solution`, or of one of those close to it. Every rank asks for the same programs, so all take the same one."""
    best = programs(replace(solution, close=()))
    least = CLEARLY * seconds_of(best)
    for other in solution.close:
        changed = solution.labels.exchanged ^ other.labels.exchanged
        trial = programs(replace(other, reasons={**dict.fromkeys(changed, WHY), **other.reasons}))
        if (seconds := seconds_of(trial)) < least:
            best, least = trial, seconds
    return best


def seconds_of(partitioned: Partitioned) -> float:
    """Predicted time of one call on the slower of the first rank, which holds the longest parts, and the last one, whose rows of a triangle see the most keys."""
    counts = {id(found): (rank, found) for rank in (partitioned.solution.degrees.ranks - 1, 0) for found in (counts_of(partitioned, rank),)}
    return max(timeline(partitioned.program(rank).graph.nodes, found, partitioned.machine).total for rank, found in counts.values())
