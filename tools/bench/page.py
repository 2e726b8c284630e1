"""A page of benchmarks, made of what the command wrote as JSON: tables, plots, and plain words about what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqpar.tools.bench import emulated, host, plots, published, report
from seqpar.tools.bench.contenders import ALONE, OURS, PEERS, RATED
from seqpar.tools.bench.emulated import Emulated
from seqpar.tools.bench.report import Run

HEAD = """# Benchmarks

This page is written by a command; nothing on it is edited by hand. `python -m seqpar.tools.bench --write PAGE.md` measures and writes it,
`--json FILE` keeps the figures, and `--read FILE … --write PAGE.md` makes one page of several runs.

## What is measured

- All programs run **in one job on the same ranks, by turns**: every round runs each once, in another order each round. They share weights and inputs.
- *ms* is the median over the rounds of the slowest rank's time from a common start. *speed-up* and the ratios compare times **of the same round**:
  median [lower quartile .. upper quartile]. The same code measured twice differs by a few percent: a ratio whose range includes 1 says nothing.
- *received* and *calls* are counted while the program runs: bytes that the busiest rank gets from other ranks per step, and calls of collectives.
- *error* is |out - model| / |model| against the model itself in one process. A program with another result than the model's is not timed.
- *peak MiB/rank*: tensors alive at once besides weights and inputs, of the rank with most. *first result s*: from the model to the first result,
  tracing and compiling included.
- received, calls, error and peak are those of the uncompiled program, also where `torch.compile` is used for the times.
- On CPU ranks are processes with one thread each, on loopback (gloo): communication is nearly free there. A simulated link gives every collective a stated delay
  and bandwidth; there only functional collectives are counted (all of seqpar's, of diffusers' plain form and of torch's): for the others take received and calls
  from a run without a link.

## What is predicted

*Emulated* ranks run one after another on one device, with real kernels; their collectives are stand-ins that cost nothing. Computing, launching and
memory are measured so. The time of the collectives is **predicted** from the counted bytes and calls and the rates of a hardware profile
(`seqpar.partitioner.machines`, or one measured by `python -m seqpar.tools.calibrate`), and with it the time of a step on that many devices. The program is
replayed in its order: *hidden* is what is on the link behind contractions (which share the measured time by their operations), *exposed* what is waited for.
"""

COMMANDS = """
## Commands

    # 2 processes of this machine; then 8 GPUs
    python -m seqpar.tools.bench --model flux qwen-image wan --mesh u2 r2 --tokens 2048 4096 --json FILE
    torchrun --nproc-per-node 8 -m seqpar.tools.bench --mesh u8 u4r2 --tokens 32768
    # as if on such a link; all programs compiled
    python -m seqpar.tools.bench --slow-link 1Gbit:50us
    python -m seqpar.tools.bench --compile inductor
    # 2, 4 and 8 ranks, one after another on one GPU
    python -m seqpar.tools.bench --emulate-ranks 2 4 8 --model full:flux --size 1024x1024 --hardware H100
    # a profile of your machines: --hardware mine.json
    python -m seqpar.tools.calibrate --ranks 8 --write mine.json
"""

NOTHING = """
## Figures

None have been recorded yet.
"""


def contenders() -> str:
    """The programs that are compared."""
    rows = [f"| {f'`{c.option}`' if c in PEERS else 'always'} | {c.name} | {c.about} |" for c in (ALONE, *PEERS, OURS)]
    rows.append(f"| with `--slow-link` | {RATED.name} | {RATED.about} |")
    return "\n".join(["## Programs", "", "| `--peer` | name | what it is |", "|---|---|---|", *rows, "", "Where a program cannot run, its row says why."])


def images(documents: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name of a plot -> SVG."""
    found = {}
    for number, document in enumerate(documents, 1):
        runs = [report.from_dict(run) for run in document.get("runs", ())]
        if runs:
            found[f"times-{number}"] = plots.step_times(runs)
            if plots.scaled(runs):
                found[f"scaling-{number}"] = plots.scaling(runs)
    return found


def subject(runs: Sequence[Run]) -> str:
    """What tells the jobs of a page apart: `flux, wan, 2,048 and 4,096 tokens, inductor`."""
    models = dict.fromkeys(run.model for run in runs)
    tokens = dict.fromkeys(f"{run.sizes.tokens:,}" for run in runs)
    return ", ".join([*models, f"{' and '.join(tokens)} tokens", *dict.fromkeys(word for run in runs for word in (run.backend, run.link) if word)])


def section(number: int, document: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The figures of one job. names: plot -> file."""
    runs = [report.from_dict(run) for run in document.get("runs", ())]
    emulations = [Emulated.from_dict(row) for row in document.get("emulated", ())]
    gpus = document["host"]["gpus"]
    lines = [f"## Measured: {subject(runs)}" if runs else f"## Emulated: {gpus[0] if gpus else document['host']['processor']}", ""]
    lines += [f"    {document['host']['command']}", "", host.one_line(document["host"]) + ".", ""]
    for kind, words in (("times", "Step times with quartiles"), ("scaling", "Speed-up over one process by tokens, with quartiles; rings dashed")):
        if f"{kind}-{number}" in names:
            lines += [f"![{words}]({names[f'{kind}-{number}']})", ""]
    return "\n".join([*lines, *("\n\n".join([*map(report.markdown, runs), *map(emulated.markdown, emulations)])).splitlines()])


def write(path: Path, documents: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the page, and its plots beside it as STEM-times-1.svg and so on; plots of an earlier page go. Returns what was written."""
    pictures = images(documents)
    names = {name: f"{path.stem}-{name}.svg" for name in pictures}
    for old in path.parent.glob(f"{path.stem}-*-[0-9]*.svg"):
        old.unlink()
    parts = [HEAD.rstrip(), COMMANDS.strip(), contenders(), *(section(i, document, names) for i, document in enumerate(documents, 1))]
    if any(document.get("emulated") for document in documents):
        parts.append(published.markdown())
    path.write_text("\n\n".join(parts) + ("\n" if documents else "\n" + NOTHING))
    for name, svg in pictures.items():
        (path.parent / names[name]).write_text(svg)
    return [path, *(path.parent / name for name in names.values())]
