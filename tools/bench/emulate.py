"""Several ranks on one device: every rank's program runs in turn with real kernels, its collectives are stand-ins that cost nothing.

Measured: the compute time of each rank, the time its kernels take to launch, its peak memory, and the same of the model itself. Predicted: the time of the
collectives, from what was counted and the rates of a hardware profile, and so the time of the ranks together. Ranks whose parts have equal sizes run the same
kernels and are measured once.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seqpar.errors import SeqparError
from seqpar.models.family import output_tensors
from seqpar.partitioner.cost import Machine
from seqpar.passes.live_bytes import LiveBytes
from seqpar.passes.pipeline import Partitioned, partition
from seqpar.passes.timeline import timeline
from seqpar.passes.trace import Traced, trace
from seqpar.suggestion import splits
from seqpar.tools.bench.contender import compiled, many_programs
from seqpar.tools.bench.emulated import Emulated, RankTimes
from seqpar.tools.bench.measure import WARM_UP_ROUNDS, rotated
from seqpar.tools.bench.progress import log
from seqpar.tools.bench.stand_in import Pool, bind_stand_ins, stand_ins


@dataclass(frozen=True)
class Entry:
    """Something to time. plain: the same uncompiled. pool: where its stand-in collectives take their results."""

    call: Callable[[], Any]
    plain: Callable[[], Any]
    pool: Pool | None = None


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(entry: Entry, device: torch.device) -> tuple[float, float]:
    """(milliseconds until the results are there, milliseconds until the call returned: on a GPU, the launches)."""
    synchronise(device)
    started = time.perf_counter()
    outputs = entry.call()
    launched = time.perf_counter()
    synchronise(device)
    done = time.perf_counter()
    del outputs
    return 1e3 * (done - started), 1e3 * (launched - started)


def peak(entry: Entry, known: Iterable[torch.Tensor], device: torch.device) -> int:
    """Bytes of one call at its peak, besides weights and inputs; what it receives included."""
    if entry.pool is not None:
        entry.pool.fresh = True
    try:
        if device.type != "cuda":
            with LiveBytes(known) as live:
                entry.plain()  # operators of a compiled program cannot be seen one by one
            return live.peak
        entry.call()  # workspaces of libraries stay allocated
        gc.collect()
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        entry.call()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    finally:
        if entry.pool is not None:
            entry.pool.fresh = False


def time_all(entries: Sequence[Entry], known: Sequence[torch.Tensor], rounds: int, device: torch.device) -> list[RankTimes]:
    """Peak memory of each, then rounds in which each runs once, in another order each round."""
    log.info("  peak memory of %d programs", len(entries))
    peaks = [peak(entry, known, device) for entry in entries]
    log.info("  %d rounds of %d programs", rounds, len(entries))
    times: list[list[tuple[float, float]]] = [[] for _ in entries]
    for number in range(-WARM_UP_ROUNDS, rounds):
        for i in rotated(len(entries), number):
            taken = once(entries[i], device)
            if number >= 0:
                times[i].append(taken)
        log.debug("  round %d of %d" if number >= 0 else "  warmed up", *((number + 1, rounds) if number >= 0 else ()))
    return [RankTimes(tuple(t for t, _ in rows), tuple(h for _, h in rows), p) for rows, p in zip(times, peaks, strict=True)]


def partitions(traced: Traced, ranks: Sequence[int], meshes: Sequence[tuple[int, int]], machine: Machine) -> tuple[list[Partitioned], list[str]]:
    """For every number of ranks the given meshes of that size, or else the split with the most Ulysses that the model permits; and what was refused."""
    found, refused = [], []
    for count in ranks:
        given = [(u, r) for u, r in meshes if u * r == count]
        reasons = []
        for ulysses, ring in given or [(u, r) for u, r in splits(count) if u * r == count]:
            try:
                found.append(partition(traced, ulysses=ulysses, ring=ring, machine=machine))
            except SeqparError as error:
                reasons.append(f"ulysses {ulysses} x ring {ring}: {error}")
                continue
            if not given:
                reasons = []
                break
        refused += reasons
    return found, refused


def representatives(partitioned: Partitioned) -> list[int]:
    """One rank of each kind: ranks whose parts have the same sizes share their counts."""
    return list({id(counts): rank for rank, counts in reversed(list(enumerate(partitioned.counts)))}.values())[::-1]


def emulate(
    model: nn.Module,
    inputs: dict[str, Any],
    ranks: Sequence[int],
    machine: Machine,
    *,
    meshes: Sequence[tuple[int, int]] = (),
    rounds: int = 9,
    backend: str | None = None,
) -> tuple[Emulated, list[str]]:
    """Measure `model` on its device, and the programs of `ranks` ranks there; and the meshes that were refused, with reasons.

    inputs: keyword inputs, whole. backend: of torch.compile, for the model and all programs. Needs no process group.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), many_programs():
        log.info("  tracing %s", type(model).__name__)
        started = time.perf_counter()
        traced = trace(model, (), inputs, dynamic=False)
        seconds = time.perf_counter() - started
        found, refused = partitions(traced, ranks, meshes, machine)
        leaves = [traced.call.leaves[i].contiguous() for i in traced.input_positions]
        whole = compiled(model, backend)
        entries, places = [Entry(lambda: output_tensors(whole(**inputs)), lambda: output_tensors(model(**inputs)))], []
        for partitioned in found:
            degrees = partitioned.solution.degrees
            log.info("  ulysses %d x ring %d: writing programs", degrees.ulysses, degrees.ring)
            for rank in representatives(partitioned):
                entries.append(program(partitioned, rank, leaves, backend))
                log.debug("    rank %d", rank)
                places.append((partitioned, rank))
        known = [t for t in (*model.parameters(), *model.buffers(), *traced.constants.values(), *leaves) if isinstance(t, torch.Tensor)]
        alone, *times = time_all(entries, known, rounds, device)
    rows = [dataclasses.replace(t, **predicted(p, r, t, machine)) for (p, r), t in zip(places, times, strict=True)]
    return Emulated.of(alone, rows, machine, seconds), refused


def program(partitioned: Partitioned, rank: int, leaves: Sequence[torch.Tensor], backend: str | None) -> Entry:
    """The program of `rank` on whole inputs."""
    degrees, pool = partitioned.solution.degrees, Pool()
    gm = bind_stand_ins(partitioned.program(rank), stand_ins(degrees.ulysses, degrees.ring, rank, pool))
    if backend is not None:
        gm(*leaves)  # the pool is filled before the compiler looks at it
    run = compiled(gm, backend)
    return Entry(lambda: run(*leaves), lambda: gm(*leaves), pool)


def predicted(partitioned: Partitioned, rank: int, times: RankTimes, machine: Machine) -> dict[str, Any]:
    """Where this rank stands, and the milliseconds that its collectives add to what was measured, and that they take behind work.

    What overlaps is predicted with the measured rate of this rank, so that computing takes as long as it did.
    """
    counts, degrees = partitioned.counts[rank], partitioned.solution.degrees
    rate = counts.total_flops / (1e-3 * times.median) if counts.total_flops else machine.flops_per_s
    course = timeline(partitioned.program(rank).graph.nodes, counts, dataclasses.replace(machine, flops_per_s=rate))
    alike = sum(other is counts for other in partitioned.counts)
    return {
        "ulysses": degrees.ulysses,
        "ring": degrees.ring,
        "rank": rank,
        "alike": alike,
        "received": sum(counts.traffic.bytes.values()),
        "calls": sum(counts.traffic.calls.values()),
        "collectives_ms": 1e3 * sum(course.exposed.values()),
        "hidden_ms": 1e3 * sum(course.hidden.values()),
    }
