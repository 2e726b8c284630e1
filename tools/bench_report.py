"""What the benchmark measured: medians, paired ratios with their spread, as text and as JSON."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seqpar.errors import SeqparError

ONE, PEER, OURS = "one process", "diffusers", "seqpar"


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

    `peak_bytes`: per rank, tensors alive besides weights and inputs. `refusal` says why there is nothing else.
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
        return self.program if self.program == ONE else f"{self.program} {mesh_name(self.ulysses, self.ring)}"


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


def best(timed: Sequence[Timed], program: str) -> Timed | None:
    """The fastest mesh of a program, by the median."""
    ran = [t for t in timed if t.program == program and t.milliseconds]
    return min(ran, key=lambda t: statistics.median(t.milliseconds), default=None)


def verdicts(timed: Sequence[Timed]) -> dict[str, Spread]:
    """Paired ratios of seqpar to the peers: each mesh to the same mesh, and the best to the best. Below 1: seqpar is faster."""
    found = {}
    for ours in (t for t in timed if t.program == OURS and t.milliseconds):
        for theirs in (t for t in timed if t.program == PEER and t.milliseconds):
            if (ours.ulysses, ours.ring) == (theirs.ulysses, theirs.ring):
                found[f"{ours.name} / {theirs.name}"] = paired(ours, theirs)
    ours_best, theirs_best = best(timed, OURS), best(timed, PEER)
    if ours_best and theirs_best:
        found["best seqpar / best diffusers"] = paired(ours_best, theirs_best)
    return found


def to_dict(model: str, sizes: Any, timed: Sequence[Timed]) -> dict[str, Any]:
    """JSON-able."""
    one = timed[0]
    rows = [dataclasses.asdict(t) | ({"speed_up": dataclasses.asdict(paired(one, t))} if t.milliseconds else {}) for t in timed]
    ratios = {name: dataclasses.asdict(spread) for name, spread in verdicts(timed).items()}
    return {"model": model, "sizes": dataclasses.asdict(sizes), "programs": rows, "ratios": ratios}


def table(model: str, sizes: Any, timed: Sequence[Timed]) -> str:
    """One line per program, then the ratios; ranges are the quartiles over the rounds."""
    one = timed[0]
    lines = [
        f"{model}: {sizes.blocks} blocks, {sizes.heads} x {sizes.head_dim}, {sizes.tokens} + {sizes.text_tokens} tokens, "
        f"{len(one.milliseconds)} rounds, order rotated",
        f"{'program':16} {'ms (median)':>12} {'speed-up over one process':>29} {'received':>11} {'calls':>5} {'error':>8} {'peak MiB/rank':>14} {'compile s':>9}",
    ]
    for t in timed:
        if not t.milliseconds:
            lines.append(f"{t.name:16} cannot: {t.refusal}")
            continue
        lines.append(
            f"{t.name:16} {statistics.median(t.milliseconds):12.1f} {paired(one, t)!s:>29} {sum(t.bytes.values()):11,} {sum(t.calls.values()):5}"
            f" {t.relative_error:8.1e} {max(t.peak_bytes) / 2**20:14.1f} {t.compile_seconds:9.1f}"
        )
    lines += [f"{name}: {spread} of the time" for name, spread in verdicts(timed).items()]
    return "\n".join(lines)
