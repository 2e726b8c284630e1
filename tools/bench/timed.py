"""What the benchmark measured of one program: medians, paired ratios with their spread."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from seqpar.errors import SeqparError
from seqpar.tools.bench.contenders import ALONE, OWN


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(low, median, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f} .. {self.high:.3f}]"


@dataclass(frozen=True)
class Timed:
    """One program on one mesh: milliseconds of the slowest rank, one entry per round; bytes and calls of the busiest rank, per kind.

    bytes, calls and peak_bytes (per rank that ran: tensors alive besides weights and inputs) are those of the uncompiled program. compile_seconds: from the model to
    the first result, one call included. refusal: why there is nothing else.
    """

    program: str
    ulysses: int
    ring: int
    milliseconds: tuple[float, ...] = ()
    bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    relative_error: float = 0.0
    peak_bytes: tuple[int, ...] = ()
    compile_seconds: float = 0.0
    refusal: str = ""

    @property
    def name(self) -> str:
        """`diffusers u2`."""
        return self.program if self.program == ALONE.name else f"{self.program} {mesh_name(self.ulysses, self.ring)}"

    @property
    def median(self) -> float:
        """Milliseconds of a step."""
        return statistics.median(self.milliseconds)


def mesh_name(ulysses: int, ring: int) -> str:
    """(2, 1) -> "u2", (2, 2) -> "u2r2"."""
    return "".join(f"{letter}{degree}" for letter, degree in (("u", ulysses), ("r", ring)) if degree > 1)


def parse_mesh(text: str) -> tuple[int, int]:
    """ "u2r2" -> (2, 2); raises SeqparError."""
    degrees = {"u": 1, "r": 1}
    for part in text.replace("r", " r").replace("u", " u").split():
        if part[0] not in degrees or not part[1:].isdigit() or degrees[part[0]] != 1:
            raise SeqparError(f"a mesh is written u2, r2 or u2r2, not {text!r}")
        degrees[part[0]] = int(part[1:])
    if min(degrees.values()) < 1 or max(degrees.values()) < 2:
        raise SeqparError(f"the degrees of a mesh must be >= 1, and one of them larger, not {text!r}")
    return degrees["u"], degrees["r"]


def paired(numerator: Timed, denominator: Timed) -> Spread:
    """Ratio of the times of the same round."""
    return Spread.of([a / b for a, b in zip(numerator.milliseconds, denominator.milliseconds, strict=True)])


def best(timed: Sequence[Timed]) -> Timed | None:
    """The fastest of those that ran, by the median."""
    return min((t for t in timed if t.milliseconds), key=lambda t: t.median, default=None)


def verdicts(timed: Sequence[Timed]) -> dict[str, Spread]:
    """Paired ratios of seqpar to the peers: each mesh to the same mesh, and the best to the best. Below 1: seqpar is faster."""
    ours, theirs = [t for t in timed if t.program in OWN], [t for t in timed if t.program not in (ALONE.name, *OWN)]
    found = {
        f"{own.name} / {peer.name}": paired(own, peer)
        for own in ours
        for peer in theirs
        if own.milliseconds and peer.milliseconds and (own.ulysses, own.ring) == (peer.ulysses, peer.ring)
    }
    own_best, peer_best = best(ours), best(theirs)
    if own_best and peer_best:
        found[f"best seqpar ({own_best.name}) / best peer ({peer_best.name})"] = paired(own_best, peer_best)
    return found
