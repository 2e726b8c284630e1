"""What others publish about their own programs: speed-ups of whole pipelines over one GPU. None was reproduced here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """speed_ups: mesh -> times as fast as one GPU, computed from the seconds that `source` gives."""

    source: str
    case: str
    speed_ups: tuple[tuple[str, float], ...]


ROWS = (
    Published("vLLM-Omni, documentation", "Qwen-Image 2048 x 2048, 50 steps, H800", (("u2", 1.73), ("u4", 2.84), ("u8", 3.65))),
    Published("vLLM-Omni, documentation", "Qwen-Image 1024 x 1024, A100", (("r2", 1.51), ("u2r2", 1.87), ("r4", 1.94))),
    Published("vLLM-Omni #1772", "LongCat-Image, H100", (("u2", 1.37), ("r2", 1.22), ("u2r2", 0.94))),
    Published("xDiT, documentation", "FLUX.1-dev, 28 steps, H100, eager", (("u2", 1.53), ("r2", 1.26), ("u4", 1.58), ("r4", 1.31), ("u2r2", 1.29))),
    Published("xDiT, documentation", "the same, compiled", (("u2", 1.60), ("r2", 1.65), ("u4", 2.64), ("r4", 2.17), ("u2r2", 2.39))),
    Published("xDiT, documentation", "HunyuanVideo 720p, 129 frames, H100", (("u2", 2.06), ("u4", 3.70), ("u8", 5.63))),
)


def markdown() -> str:
    """A section of a page."""
    rows = [f"| {row.source} | {row.case} | {', '.join(f'{mesh} {value:.2f}' for mesh, value in row.speed_ups)} |" for row in ROWS]
    return "\n".join(
        [
            "## Published by others",
            "",
            "Their own figures, of whole pipelines (text encoder and decoder included) on their machines; none was reproduced here.",
            "",
            "| source | case | speed-up over one GPU |",
            "|---|---|---|",
            *rows,
        ]
    )
