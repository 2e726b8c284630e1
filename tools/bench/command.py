"""Step time of seqpar beside its peers, in one run on the same ranks; or of every rank of a job, emulated on one device.

    python -m seqpar.tools.bench [--model flux …] [--mesh u2 r2 …] [--tokens 2048 4096 …] [--peer diffusers torch …] [--compile inductor]
                                 [--slow-link 1Gbit:50us] [--json FILE] [--write docs/benchmarks.md]
    python -m seqpar.tools.bench --emulate-ranks 2 4 8 --model full:flux --size 1024x1024 --hardware H100
    python -m seqpar.tools.bench --read FILE … --write docs/benchmarks.md

Ranks are local processes (gloo on CPU, nccl on GPUs), or those of torchrun. docs/benchmarks.md says what is measured and what is predicted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seqpar.errors import SeqparError
from seqpar.launching import launch, pick_device_type, under_launcher
from seqpar.partitioner.machines import find_machine
from seqpar.tools.bench import emulated, host, page, progress, report
from seqpar.tools.bench.contenders import PEERS
from seqpar.tools.bench.link import parse_link
from seqpar.tools.bench.measure import Job, measure
from seqpar.tools.bench.report import Run
from seqpar.tools.bench.timed import parse_mesh
from seqpar.tools.sized_models import PEER_MODELS, Sizes

DEFAULT_MODELS, DEFAULT_MESHES = ("flux", "qwen-image", "wan"), ("u2", "r2")


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = argparse.ArgumentParser(prog="python -m seqpar.tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("--model", nargs="+", metavar="NAME", help=f"{', '.join(PEER_MODELS)} (default: {' '.join(DEFAULT_MODELS)}); to emulate: full:NAME, tiny:NAME")
    add("--mesh", nargs="+", help="u2, r2, u2r2, …; all of the same number of ranks (default: u2 r2)")
    add("--peer", nargs="+", choices=[*(peer.option for peer in PEERS), "all", "none"], default=["all"])
    add("--rounds", type=int, default=9)
    for field in dataclasses.fields(Sizes):
        option = f"--{field.name.replace('_', '-')}"
        if field.name == "tokens":
            add(option, type=int, nargs="+", default=[2048], help="several are measured one after another")
        else:
            add(option, type=int, default=field.default)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of weights and inputs (default: float32; bfloat16 on a GPU)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--threads", type=int, default=1, help="of every rank, on CPU")
    add("--compile", metavar="BACKEND", help="of torch.compile, for all programs: inductor, …")
    add("--slow-link", metavar="RATE[:DELAY]", help="1Gbit:50us: collectives take as long as on such a link")
    add("--emulate-ranks", type=int, nargs="+", metavar="N", help="run the programs of N ranks by turns on one device; one process, no launcher")
    add("--size", metavar="HxW[xFRAMES]", help="of the picture or video, in pixels; to emulate (default: what the model is published for)")
    add("--hardware", default="H100", help="whose collectives are predicted; to emulate: a name, or a file of seqpar.tools.calibrate (default H100)")
    add("--read", nargs="*", metavar="FILE", help="measure nothing: take the figures from files that --json wrote")
    add("--json", metavar="FILE", help="write all figures there")
    add("--write", metavar="PAGE.md", help="write a page there, and its plots (SVG) beside it")
    return top


def job_of(options: argparse.Namespace, device: str) -> Job:
    """What the options ask the ranks to do. Raises SeqparError."""
    models = tuple(options.model or DEFAULT_MODELS)
    unknown = [name for name in models if name not in PEER_MODELS]
    if unknown:
        raise SeqparError(f"no peer has a plan for {', '.join(unknown)}; models: {', '.join(PEER_MODELS)} (full:NAME and tiny:NAME are for --emulate-ranks)")
    fixed = {field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes) if field.name != "tokens"}
    peers = [peer.option for peer in PEERS] if "all" in options.peer else [name for name in options.peer if name != "none"]
    return Job(
        models=models,
        sizes=tuple(Sizes(tokens=tokens, **fixed) for tokens in options.tokens),
        meshes=tuple(parse_mesh(text) for text in options.mesh or DEFAULT_MESHES),
        rounds=options.rounds,
        peers=tuple(peers),
        dtype=options.dtype or ("bfloat16" if device == "cuda" else "float32"),
        backend=options.compile,
        slow_link=parse_link(options.slow_link) if options.slow_link else None,
        threads=options.threads,
    )


def run_job(options: argparse.Namespace) -> list[Run]:
    """Measure, on ranks that are started here or by torchrun."""
    ulysses, ring = parse_mesh((options.mesh or DEFAULT_MESHES)[0])
    device = pick_device_type(options.device, ulysses * ring)
    job = job_of(options, device)
    os.environ.setdefault("OMP_NUM_THREADS", str(job.threads))
    found = launch(measure, job.ranks, job, device=device)[0]
    link = f"on a link of {options.slow_link}" if options.slow_link else ""
    return [Run(name, sizes, tuple(timed), job.dtype, device, job.backend, link) for name, sizes, timed in found]


def run_emulation(options: argparse.Namespace) -> list[emulated.Emulated]:
    """Every model in turn, in this process."""
    from seqpar.tools.bench.emulate import emulate
    from seqpar.tools.bench.weights import full_case

    if options.rounds < 1 or min(options.emulate_ranks) < 2:
        raise SeqparError(f"--emulate-ranks and --rounds must be at least 2 and 1, got {options.emulate_ranks} and {options.rounds}")
    machine = find_machine(options.hardware)
    device = torch.device(pick_device_type(options.device))
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    meshes = [parse_mesh(text) for text in options.mesh or ()]
    progress.show(0)
    found, models = [], options.model or ["full:flux"]
    for number, name in enumerate(models, 1):
        progress.log.info("%d of %d: %s on %s, programs of %s ranks", number, len(models), name, device, ", ".join(map(str, options.emulate_ranks)))
        title, model, inputs = full_case(name, options.size, device, getattr(torch, dtype))
        result, refused = emulate(model, inputs, options.emulate_ranks, machine, meshes=meshes, rounds=options.rounds, backend=options.compile)
        for reason in refused:
            print(f"{title}: {reason}", file=sys.stderr)
        words = [title, dtype, options.compile or ""]
        found.append(dataclasses.replace(result, title=", ".join(word for word in words if word)))
        del model, inputs
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints tables. The exit status is 1 if seqpar could not run, or computed something else, where it was asked to."""
    options = parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        documents = [measured(options, given)] if options.read is None else [found for name in options.read for found in read(Path(name))]
        if under_launcher() and os.environ["RANK"] != "0":
            return 0
        show(documents)
        if options.json:
            Path(options.json).write_text(json.dumps(documents[0] if len(documents) == 1 else documents, indent=1))
        if options.write:
            page.write(Path(options.write), documents)
    except (SeqparError, OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"error: {error}") from error
    ours = [t for document in documents for run in document.get("runs", ()) for t in report.from_dict(run).programs if t.program == "seqpar"]
    return 1 if any(t.refusal for t in ours) else 0


def read(path: Path) -> list[dict[str, Any]]:
    """The documents of a file that --json wrote. Raises SeqparError."""
    found = json.loads(path.read_text())
    documents = found if isinstance(found, list) else [found]
    if not all(isinstance(document, dict) and "host" in document for document in documents):
        raise SeqparError(f"{path} was not written by --json of this command")
    return documents


def measured(options: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """One document: where, how, what was found."""
    described = {"host": host.describe(given)}
    if options.emulate_ranks:
        return described | {"emulated": [found.to_dict() for found in run_emulation(options)]}
    return described | {"runs": [report.to_dict(run) for run in run_job(options)]}


def show(documents: Sequence[dict[str, Any]]) -> None:
    """All tables, on the terminal."""
    for document in documents:
        print(f"{document['host']['command']}\n{host.one_line(document['host'])}\n")
        tables = [report.table(report.from_dict(run)) for run in document.get("runs", ())]
        tables += [emulated.table(emulated.Emulated.from_dict(row)) for row in document.get("emulated", ())]
        print("\n\n".join(tables), end="\n\n")
