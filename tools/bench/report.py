"""What the benchmark found: as JSON, and as a table for people."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seqpar.tools.bench.timed import Timed, mesh_name, paired, verdicts
from seqpar.tools.sized_models import Sizes


@dataclass(frozen=True)
class Run:
    """One model at one size: every program, one process first. link: a simulated link in words; backend: of torch.compile."""

    model: str
    sizes: Sizes
    programs: tuple[Timed, ...]
    dtype: str = "float32"
    device: str = "cpu"
    backend: str | None = None
    link: str = ""

    @property
    def title(self) -> str:
        """`flux: 4 blocks, 8 x 64, 2,048 + 64 tokens, float32, inductor, 1 Gbit/s`."""
        s = self.sizes
        words = [f"{s.blocks} blocks", f"{s.heads} x {s.head_dim}", f"{s.tokens:,} + {s.text_tokens:,} tokens", self.dtype, self.backend or "", self.link]
        return f"{self.model}: {', '.join(word for word in words if word)}"


def to_dict(run: Run) -> dict[str, Any]:
    """JSON-able, with the ratios; `from_dict` reads it."""
    one = run.programs[0]
    rows = [dataclasses.asdict(t) | ({"speed_up": dataclasses.asdict(paired(one, t))} if t.milliseconds else {}) for t in run.programs]
    ratios = {name: dataclasses.asdict(spread) for name, spread in verdicts(run.programs).items()}
    return dataclasses.asdict(run) | {"programs": rows, "ratios": ratios}


def from_dict(data: dict[str, Any]) -> Run:
    """The inverse of `to_dict`."""
    fields = {field.name for field in dataclasses.fields(Timed)}
    tuples = ("milliseconds", "peak_bytes")
    rows: list[dict[str, Any]] = [{k: tuple(v) if k in tuples else v for k, v in row.items() if k in fields} for row in data["programs"]]
    rest = {k: v for k, v in data.items() if k not in ("programs", "ratios", "sizes")}
    return Run(sizes=Sizes(**data["sizes"]), programs=tuple(Timed(**row) for row in rows), **rest)


COLUMNS = ("program", "mesh", "ms", "speed-up over one process", "received MiB", "calls", "by kind", "error", "peak MiB/rank", "first result s")


def cells(one: Timed, t: Timed) -> tuple[str, ...]:
    """A row of the table."""
    mesh = mesh_name(t.ulysses, t.ring) or "-"
    if not t.milliseconds:
        return (t.program, mesh, f"cannot: {t.refusal}")
    kinds = ", ".join(f"{calls} {kind}" for kind, calls in t.calls.items() if calls)
    return (
        t.program,
        mesh,
        f"{t.median:.1f}",
        str(paired(one, t)),
        f"{sum(t.bytes.values()) / 2**20:.2f}",
        str(sum(t.calls.values())),
        kinds or "-",
        f"{t.relative_error:.1e}",
        f"{max(t.peak_bytes) / 2**20:.1f}",
        f"{t.compile_seconds:.1f}",
    )


def table(run: Run) -> str:
    """One line per program, then the ratios; ranges are the quartiles over the rounds."""
    one = run.programs[0]
    rows = [cells(one, t) for t in run.programs]
    widths = [max(len(row[i]) for row in (COLUMNS, *(row for row in rows if len(row) > i + 1 or i < 2))) for i in range(len(COLUMNS))]
    lines = [f"{run.title}; {len(one.milliseconds)} rounds, order rotated"]
    lines += [_line(row, widths) for row in (COLUMNS, *rows)]
    lines += [f"{name}: {spread} of the time" for name, spread in verdicts(run.programs).items()]
    return "\n".join(lines)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    numbers = len(row) == len(COLUMNS)
    left = (0, 1, 6)
    texts = [text.ljust(w) if i in left or not numbers else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=False))]
    return "  ".join(texts).rstrip()


def markdown(run: Run) -> str:
    """The same as a section of a page."""
    one = run.programs[0]
    lines = [f"### {run.title}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for t in run.programs:
        row = cells(one, t)
        lines.append("| " + " | ".join([*row, *[""] * (len(COLUMNS) - len(row))]) + " |")
    ratios = [f"- {name}: {spread} of the time" for name, spread in verdicts(run.programs).items()]
    return "\n".join([*lines, "", *ratios])
