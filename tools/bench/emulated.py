"""What an emulation found: per rank what was measured, per mesh what is predicted; as JSON, as a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seqpar.partitioner.cost import Machine
from seqpar.tools.bench.timed import Spread, mesh_name


@dataclass(frozen=True)
class RankTimes:
    """Measured: milliseconds and launches (milliseconds until the call returned), a round each; peak: bytes besides weights and inputs.

    Counted: received bytes and calls of collectives. Predicted: collectives_ms, what they add; hidden_ms, what they take behind work. `alike` ranks have parts of the same sizes as `rank`.
    """

    milliseconds: tuple[float, ...]
    launches: tuple[float, ...]
    peak: int
    ulysses: int = 1
    ring: int = 1
    rank: int = 0
    alike: int = 1
    received: int = 0
    calls: int = 0
    collectives_ms: float = 0.0
    hidden_ms: float = 0.0

    @property
    def median(self) -> float:
        """Measured milliseconds of computing."""
        return statistics.median(self.milliseconds)

    @property
    def predicted_ms(self) -> float:
        """Computing as measured, collectives as predicted."""
        return self.median + self.collectives_ms


@dataclass(frozen=True)
class Emulated:
    """The model itself on one device, and the ranks of every mesh. machine: whose rates the collectives have. title: the case in words."""

    alone: RankTimes
    rows: tuple[RankTimes, ...]
    machine: str
    bytes_per_s: float
    latency_s: float
    trace_seconds: float
    title: str = ""

    @staticmethod
    def of(alone: RankTimes, rows: Sequence[RankTimes], machine: Machine, trace_seconds: float) -> Emulated:
        return Emulated(alone, tuple(rows), machine.name, machine.bytes_per_s, machine.latency_s, trace_seconds)

    def slowest(self) -> list[RankTimes]:
        """Of every mesh the rank that is predicted to be slowest."""
        meshes: dict[tuple[int, int], list[RankTimes]] = {}
        for row in self.rows:
            meshes.setdefault((row.ulysses, row.ring), []).append(row)
        return [max(rows, key=lambda row: row.predicted_ms) for rows in meshes.values()]

    def share(self, row: RankTimes) -> Spread:
        """Computing of this rank over that of one process, of the same rounds; 1 / ranks is the least."""
        return Spread.of([a / b for a, b in zip(row.milliseconds, self.alone.milliseconds, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Emulated:
        return Emulated(**{**data, "alone": _times(data["alone"]), "rows": tuple(_times(row) for row in data["rows"])})


def _times(data: dict[str, Any]) -> RankTimes:
    values: dict[str, Any] = {k: tuple(v) if k in ("milliseconds", "launches") else v for k, v in data.items()}
    return RankTimes(**values)


COLUMNS = ("mesh", "ranks", "computing ms", "x ranks / one", "launching ms", "peak MiB", "received MiB", "calls", "exposed ms", "hidden ms", "step ms", "speed-up")
MEASURED = "measured: computing, launching, peak memory. Counted: received, calls"


def cells(found: Emulated) -> list[tuple[str, ...]]:
    """Rows of the table: the model itself, then the slowest rank of every mesh."""
    one = found.alone
    rows: list[tuple[str, ...]] = [("-", "1", f"{one.median:.1f}", "1", f"{statistics.median(one.launches):.1f}", f"{one.peak / 2**20:,.1f}", "-", "-", "-", "-", f"{one.median:.1f}", "1")]
    for row in found.slowest():
        ranks, share = row.ulysses * row.ring, found.share(row)
        rows.append(
            (
                mesh_name(row.ulysses, row.ring),
                str(ranks),
                f"{row.median:.1f}",
                str(Spread(*(ranks * value for value in dataclasses.astuple(share)))),
                f"{statistics.median(row.launches):.1f}",
                f"{row.peak / 2**20:,.1f}",
                f"{row.received / 2**20:.1f}",
                str(row.calls),
                f"{row.collectives_ms:.1f}",
                f"{row.hidden_ms:.1f}",
                f"{row.predicted_ms:.1f}",
                f"{one.median / row.predicted_ms:.2f}",
            )
        )
    return rows


def about(found: Emulated) -> str:
    """What was measured and what was not."""
    return (
        f"{MEASURED}. Predicted: collectives (of {found.machine}: {found.bytes_per_s / 1e9:.3g} GB/s to each rank, {found.latency_s * 1e6:.3g} us a call), exposed or hidden behind work, step and speed-up. "
        f"One device, {len(found.alone.milliseconds)} rounds, order rotated; the slowest rank of each mesh"
    )


def table(found: Emulated) -> str:
    """For a terminal."""
    rows = [COLUMNS, *cells(found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([found.title, *lines, about(found)])


def markdown(found: Emulated) -> str:
    """A section of a page."""
    header = [f"### {found.title}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*header, *("| " + " | ".join(row) + " |" for row in cells(found)), "", about(found) + "."])
