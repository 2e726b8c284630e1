"""Step time of seqpar beside its peers: one process and diffusers' own context parallelism, in one run on the same ranks.

    python -m seqpar.tools.bench [--model flux …] [--mesh u2 r2 …] [--tokens 2048] [--rounds 9] [--json PATH]

Every round runs every program once, in another order each round, so that what disturbs the machine disturbs all alike; ratios
are of times of the same round. All have the same weights and inputs, one thread per rank. Local ranks (gloo, CPU).
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from seqpar.compile import sp_compile
from seqpar.errors import SeqparError
from seqpar.launching import launch
from seqpar.models.family import output_tensors
from seqpar.passes.live_bytes import LiveBytes
from seqpar.runtime.counting import KINDS
from seqpar.runtime.mesh import build_mesh
from seqpar.tools import bench_report
from seqpar.tools.bench_report import ONE, OURS, PEER, Timed, parse_mesh
from seqpar.tools.collective_counter import CollectiveCounter
from seqpar.tools.diffusers_peer import adapted, enable
from seqpar.tools.sized_models import PEER_MODELS, Sizes, build, inputs_of
from seqpar.verification import difference

WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Program:
    """One contender, ready to run. `result` holds what is known before the timing; `alone`: rank 0 runs it, the others wait."""

    result: Timed
    model: nn.Module
    ring_group: str | None = None
    alone: bool = False


def prepare(name: str, sizes: Sizes, inputs: dict[str, Any], meshes: Sequence[tuple[int, int]]) -> list[Program]:
    """Every contender, one process first. Collective."""
    model = build(name, sizes)
    programs = [Program(Timed(ONE, 1, 1), model, alone=True)]
    for ulysses, ring in meshes:
        place = build_mesh(ulysses, ring, device_type="cpu")
        assert place.device_mesh is not None, "a mesh of one rank is no contender"
        peer = enable(build(name, sizes), ulysses, ring, place.device_mesh)
        programs.append(Program(Timed(PEER, ulysses, ring), peer))
        started = time.perf_counter()
        fast = sp_compile(model, inputs, ulysses=ulysses, ring=ring, mesh=place.device_mesh, dynamic=False)
        seconds = time.perf_counter() - started
        programs.append(Program(Timed(OURS, ulysses, ring, compile_seconds=seconds), fast, place.groups["ring"]))
    return programs


def inspect(program: Program, inputs: dict[str, Any], reference: Sequence[Tensor]) -> Program:
    """`program` with traffic, error and memory of one call, gathered from all ranks; with a refusal if it cannot run. Collective."""
    counter = CollectiveCounter(program.ring_group)
    live = LiveBytes([t for t in (*program.model.parameters(), *program.model.buffers(), *inputs.values()) if isinstance(t, Tensor)])
    try:
        with counter, live:
            outputs = output_tensors(program.model(**inputs))
    except (AssertionError, RuntimeError, ValueError) as error:  # diffusers refuses uneven parts, on every rank alike
        return dataclasses.replace(program, result=dataclasses.replace(program.result, refusal=f"{type(error).__name__}: {error}"))
    gap = max(difference(value, expected)[1] for value, expected in zip(outputs, reference, strict=True))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (counter.traffic, gap, live.peak))
    result = dataclasses.replace(
        program.result,
        bytes={kind: max(traffic.bytes[kind] for traffic, _, _ in ranks) for kind in KINDS},
        calls={kind: max(traffic.calls[kind] for traffic, _, _ in ranks) for kind in KINDS},
        relative_error=max(gap for _, gap, _ in ranks),
        peak_bytes=tuple(peak for _, _, peak in ranks),
    )
    return dataclasses.replace(program, result=result)


def rotated(count: int, round_number: int) -> list[int]:
    """An order of 0 .. count - 1 for this round: each is first equally often, and has either neighbour before it."""
    start = round_number // 2 % count
    order = [(start + i) % count for i in range(count)]
    return order[:1] + order[:0:-1] if round_number % 2 else order


def time_call(model: nn.Module, inputs: dict[str, Any], *, idle: bool) -> float:
    """Seconds of this rank, from a common start; 0 for a rank that is not needed, which waits for the others."""
    dist.barrier()
    started = time.perf_counter()
    if not idle:
        for output in output_tensors(model(**inputs)):
            if isinstance(output, AsyncCollectiveTensor):  # diffusers returns before its last gather is done
                output.wait()
    seconds = 0.0 if idle else time.perf_counter() - started
    dist.barrier()
    return seconds


def time_rounds(programs: Sequence[Program], inputs: dict[str, Any], rounds: int, rank: int) -> list[tuple[float, ...]]:
    """Per program: milliseconds of the slowest rank, a round each. Collective."""
    seconds = torch.zeros(len(programs), rounds, dtype=torch.float64)
    for number in range(-WARM_UP_ROUNDS, rounds):
        for i in rotated(len(programs), number):
            program = programs[i]
            taken = time_call(program.model, inputs, idle=program.alone and rank > 0)
            if number >= 0:
                seconds[i, number] = taken
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return [tuple(row) for row in (1e3 * seconds).tolist()]


def bench_on_rank(models: Sequence[str], sizes: Sizes, meshes: Sequence[tuple[int, int]], rounds: int) -> list[list[dict[str, Any]]]:
    """Collective: every Timed as a dict, models outermost."""
    torch.set_num_threads(1)
    found = []
    with torch.no_grad(), adapted():
        for name in models:
            inputs = inputs_of(name, sizes)
            programs = prepare(name, sizes, inputs, meshes)
            reference = output_tensors(programs[0].model(**inputs))
            programs = [inspect(program, inputs, reference) for program in programs]
            running = [program for program in programs if not program.result.refusal]
            times = time_rounds(running, inputs, rounds, dist.get_rank())
            timed = {id(p): dataclasses.replace(p.result, milliseconds=t) for p, t in zip(running, times, strict=True)}
            found.append([dataclasses.asdict(timed.get(id(p), p.result)) for p in programs])
    return found


def bench(models: Sequence[str], sizes: Sizes, meshes: Sequence[tuple[int, int]], rounds: int) -> dict[str, list[Timed]]:
    """Per model what was measured, one process first. All meshes have the same number of ranks; raises SeqparError otherwise."""
    worlds = {ulysses * ring for ulysses, ring in meshes}
    if len(worlds) != 1:
        raise SeqparError(f"programs that alternate on the same ranks need meshes of one size, got {sorted(worlds)} ranks")
    if rounds < 1:
        raise SeqparError(f"rounds must be >= 1, got {rounds}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = launch(bench_on_rank, worlds.pop(), tuple(models), sizes, tuple(meshes), rounds, device="cpu")[0]
    return {name: [Timed(**row) for row in rows] for name, rows in zip(models, found, strict=True)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table per model; `--json` also writes every number."""
    parser = argparse.ArgumentParser(prog="python -m seqpar.tools.bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", nargs="+", choices=PEER_MODELS, default=["flux", "qwen-image", "wan"])
    parser.add_argument("--mesh", nargs="+", default=["u2", "r2"], help="u2, r2, u2r2, …; all of the same number of ranks")
    parser.add_argument("--rounds", type=int, default=9)
    for field in dataclasses.fields(Sizes):
        default = {"tokens": 2048}.get(field.name, field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args(arguments)
    try:
        sizes = Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})
        found = bench(options.model, sizes, [parse_mesh(text) for text in options.mesh], options.rounds)
    except SeqparError as error:
        raise SystemExit(str(error)) from error
    print("\n\n".join(bench_report.table(name, sizes, timed) for name, timed in found.items()))
    if options.json:
        Path(options.json).write_text(json.dumps([bench_report.to_dict(name, sizes, timed) for name, timed in found.items()], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
