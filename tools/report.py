"""What a run of the text-to-image tool measured, as text for people and as a dict for programs."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

LEVELS = 255


@dataclass(frozen=True)
class Comparison:
    """One process against all ranks, same seed. `side_by_side` is the picture [all ranks | one process]."""

    max_abs_pixel_difference: float
    relative_latent_difference: float
    seconds_per_step: list[float]
    side_by_side: str


@dataclass(frozen=True)
class RunReport:
    """Invariants: one entry of `peak_memory_bytes` per rank; `plans` and `explanations` have one entry per compiled program."""

    model: str
    pipeline: str
    device: str
    dtype: str
    ulysses: int
    ring: int
    width: int
    height: int
    frames: int
    output: str
    seconds_per_step: list[float]
    peak_memory_bytes: list[int]
    plans: list[dict[str, Any]]
    explanations: list[str]
    comparison: Comparison | None = None

    def __post_init__(self) -> None:
        if len(self.plans) != len(self.explanations):
            raise ValueError(f"{len(self.plans)} plans, but {len(self.explanations)} explanations")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the explanations are text and left out."""
        result = asdict(self)
        del result["explanations"]
        return result | {"world_size": len(self.peak_memory_bytes)}

    def to_text(self) -> str:
        """About one page; ends with the picture's path and, if measured, the difference from one process."""
        ranks = len(self.peak_memory_bytes)
        frames = f" x {self.frames} frames" if self.frames > 1 else ""
        lines = [
            *self._plan_lines(),
            f"model          {self.model} ({self.pipeline}, {self.dtype}, {self.device})",
            f"ranks          {ranks} = {ranks // (self.ulysses * self.ring)} x ring {self.ring} x ulysses {self.ulysses}",
            f"time per step  {describe_seconds(self.seconds_per_step)}",
            f"peak memory    {', '.join(f'{peak / 2**20:,.0f} MiB' for peak in self.peak_memory_bytes)} (rank 0, 1, …)",
        ]
        if self.comparison:
            lines.append(f"one process    {describe_seconds(self.comparison.seconds_per_step)} per step")
        lines.append(f"picture        {self.output}  ({self.width} x {self.height}{frames})")
        if self.comparison:
            pixels = self.comparison.max_abs_pixel_difference
            lines += [
                f"side by side   {self.comparison.side_by_side}  (all ranks | one process)",
                f"difference     latents {self.comparison.relative_latent_difference:.2e} (relative), "
                f"pixels {pixels:.2e} of 1 (largest) = {pixels * LEVELS:.2g} of {LEVELS} levels",
            ]
        return "\n".join(lines)

    def _plan_lines(self) -> list[str]:
        if not self.explanations:  # a difference of zero must not pass for a success of sharding
            return ["plan           none: every rank ran the whole model"]
        more = len(self.explanations) - 1
        note = [f"(and {more} more compiled program{'s' * (more > 1)}; --json has all plans)"] if more else []
        return [self.explanations[0].rstrip(), *note, ""]


def describe_seconds(seconds: list[float]) -> str:
    """"first 3.20 s (compiles), then 0.410 s"; the first step is told apart because it holds the compilation."""
    first, *later = seconds
    if not later:
        return f"first {first:.3g} s"
    return f"first {first:.3g} s, then {statistics.median(later):.3g} s (median of {len(later)})"
