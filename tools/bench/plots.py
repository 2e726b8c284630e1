"""Plots of a benchmark (matplotlib): step times with their spread, and the speed-up over the number of tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from seqpar.errors import UnsupportedError
from seqpar.tools.bench.contenders import OWN
from seqpar.tools.bench.report import Run
from seqpar.tools.bench.timed import Spread, Timed, paired

INK, GREY = "#1f2933", "#9aa5b1"
OURS = ("#0f766e", "#5eead4")
PEERS = ("#d97706", "#7c3aed", "#2563eb", "#be185d", "#65a30d")
STYLE = {
    "svg.hashsalt": "seqpar",  # the same figures give the same file
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",  # readable on a dark page, too
}


def pyplot() -> Any:
    """matplotlib without a display. Raises UnsupportedError if it is not installed."""
    try:
        import matplotlib

        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UnsupportedError(f"plots need matplotlib ({error}): pip install matplotlib, or leave out --write") from error
    return plt


def colours(runs: Sequence[Run]) -> dict[str, str]:
    """A colour for every program, the same in all plots."""
    programs = list(dict.fromkeys(t.program for run in runs for t in run.programs))
    peers = [name for name in programs if name not in ("one process", *OWN)]
    return {"one process": GREY, **dict(zip(OWN, OURS, strict=True)), **{name: PEERS[i % len(PEERS)] for i, name in enumerate(peers)}}


def step_times(runs: Sequence[Run]) -> str:
    """SVG: a panel per run, a bar per program that ran; whiskers are the quartiles."""
    plt, colour = pyplot(), colours(runs)
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    height = max(len(ran(run)) for run in runs) * 0.26 + 0.8
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(4.0 * columns, height * rows), squeeze=False, layout="constrained")
        for axis in axes.flat[len(runs) :]:
            axis.axis("off")
        for axis, run in zip(axes.flat, runs, strict=False):
            bars = ran(run)
            spreads = [Spread.of(t.milliseconds) for t in bars]
            middle = [s.median for s in spreads]
            whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            axis.barh([t.name for t in bars], middle, xerr=whiskers, color=[colour[t.program] for t in bars], error_kw={"elinewidth": 1, "ecolor": INK})
            axis.invert_yaxis()
            axis.set_title(short(run), loc="left")
            axis.set_xlabel("ms per step, slowest rank")
        return as_svg(plt, figure)


def scaling(runs: Sequence[Run]) -> str:
    """SVG: a panel per model, speed-up over one process by the number of tokens, a line per program; bands are the quartiles."""
    plt, colour = pyplot(), colours(runs)
    series = list(scaled(runs).items())
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(series), figsize=(4.0 * len(series) + 1.6, 3.2), squeeze=False, layout="constrained", sharey=True)
        for axis, (title, lines) in zip(axes.flat, series, strict=True):
            for (program, name), points in lines.items():
                tokens = [count for count, _ in points]
                style = {"color": colour[program], "linestyle": "--" if " r" in name else "-", "marker": "o", "markersize": 3}
                axis.plot(tokens, [s.median for _, s in points], label=name, **style)
                axis.fill_between(tokens, [s.low for _, s in points], [s.high for _, s in points], color=colour[program], alpha=0.15, linewidth=0)
            axis.set_xscale("log", base=2)
            ticks = sorted({count for points in lines.values() for count, _ in points})
            axis.set_xticks(ticks, [f"{count:,}" for count in ticks])
            axis.set_title(title, loc="left")
            axis.set_xlabel("tokens")
        axes[0, 0].set_ylabel("speed-up over one process")
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
        return as_svg(plt, figure)


def scaled(runs: Sequence[Run]) -> dict[str, dict[tuple[str, str], list[tuple[int, Spread]]]]:
    """Per series of runs that differ in the tokens only: (program, its name) -> (tokens, speed-up), at least two points each."""
    found: dict[str, dict[tuple[str, str], list[tuple[int, Spread]]]] = {}
    for run in sorted(runs, key=lambda run: run.sizes.tokens):
        one, *others = run.programs
        title = ", ".join(word for word in (run.model, run.dtype, run.device, run.backend or "", run.link) if word not in ("", "float32", "cpu"))
        for t in others:
            if t.milliseconds:
                found.setdefault(title, {}).setdefault((t.program, t.name), []).append((run.sizes.tokens, paired(one, t)))
    several = {title: {key: points for key, points in lines.items() if len({n for n, _ in points}) > 1} for title, lines in found.items()}
    return {title: lines for title, lines in several.items() if lines}


def ran(run: Run) -> list[Timed]:
    """The programs with times."""
    return [t for t in run.programs if t.milliseconds]


def short(run: Run) -> str:
    """A title that fits over a panel."""
    return ", ".join(word for word in (run.model, f"{run.sizes.tokens:,} tokens", run.backend or "", run.link) if word)


def as_svg(plt: Any, figure: Any) -> str:
    """The figure as text; it is closed."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
