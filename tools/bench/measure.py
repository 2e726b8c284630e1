"""What every rank of the benchmark does: prepare all programs, look at each once, then time them by turns.

Every round runs every program once, in another order each round, so that what disturbs the machine disturbs all alike; ratios
are of times of the same round. All have the same weights (the very same tensors, within a process) and inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from seqpar.errors import SeqparError
from seqpar.launching import this_rank
from seqpar.models.family import output_tensors
from seqpar.passes.live_bytes import LiveBytes
from seqpar.runtime.counting import KINDS
from seqpar.runtime.mesh import build_mesh
from seqpar.tools.bench import progress
from seqpar.tools.bench.contender import Call, Contender, Setting, many_programs
from seqpar.tools.bench.contenders import ALONE, OURS, PEERS, RATED
from seqpar.tools.bench.link import linked
from seqpar.tools.bench.progress import log
from seqpar.tools.bench.timed import Timed
from seqpar.tools.collective_counter import CollectiveCounter
from seqpar.tools.diffusers_peer import adapted
from seqpar.tools.sized_models import Sizes, build, inputs_of
from seqpar.verification import TOLERANCE, difference

WARM_UP_ROUNDS = 2
SLACK = 10  # a program whose error is this many times what `verify` allows computes something else


@dataclass(frozen=True)
class Job:
    """What is measured. Invariants: all meshes have the same number of ranks, >= 2; rounds >= 1.

    slow_link: (bits per second, seconds) of a simulated link; backend: of torch.compile, for all programs alike.
    """

    models: tuple[str, ...]
    sizes: tuple[Sizes, ...]
    meshes: tuple[tuple[int, int], ...]
    rounds: int = 9
    peers: tuple[str, ...] = (PEERS[0].option,)
    dtype: str = "float32"
    backend: str | None = None
    slow_link: tuple[float, float] | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        worlds = {ulysses * ring for ulysses, ring in self.meshes}
        if len(worlds) != 1 or min(worlds) < 2:
            raise SeqparError(f"programs that alternate on the same ranks need meshes of one size of at least 2, got {sorted(worlds)} ranks")
        if self.rounds < 1 or self.threads < 1:
            raise SeqparError(f"rounds and threads must be >= 1, got {self.rounds} and {self.threads}")

    @property
    def ranks(self) -> int:
        """How many ranks take part."""
        return self.meshes[0][0] * self.meshes[0][1]

    def contenders(self) -> list[tuple[Contender, int, int]]:
        """(contender, ulysses, ring) of every row, one process first."""
        chosen = [*(peer for peer in PEERS if peer.option in self.peers), OURS, *([RATED] if self.slow_link else [])]
        return [(ALONE, 1, 1), *((c, u, r) for u, r in self.meshes for c in chosen if c.suits(u, r))]


@dataclass(frozen=True)
class Program:
    """One contender, ready to run. `result`: what is known before the timing."""

    result: Timed
    call: Call
    alone: bool = False


def everywhere(value: Any) -> list[Any]:
    """The value of every rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def attempt(run: Callable[[], Any]) -> tuple[Any, str]:
    """What `run` returns, or the reason why some rank could not; peers refuse with errors of all types, on every rank alike. Collective."""
    result, refusal = None, ""
    try:
        result = run()
    except Exception as error:
        refusal = f"{type(error).__name__}: {shortened(str(error))}"
    return result, next((said for said in everywhere(refusal) if said), "")


def shortened(text: str, limit: int = 200) -> str:
    """The first sentence of a message, or as much of it as fits into a row."""
    sentence = text.strip().partition("\n")[0].partition(". ")[0]
    return sentence if len(sentence) <= limit else sentence[: limit - 1] + "…"


def prepare(contender: Contender, setting: Setting, reference: Sequence[Tensor]) -> Program:
    """The contender with traffic, error and memory of its second call, then compiled if it is to be; or with its refusal. Collective."""
    result = Timed(contender.name, *((1, 1) if contender.alone else (setting.place.ulysses, setting.place.ring)))
    idle = contender.alone and dist.get_rank() > 0

    def first(backend: str | None) -> tuple[Call, float]:
        started = time.perf_counter()
        call = contender.prepare(dataclasses.replace(setting, backend=backend))
        if not idle:
            finish(call(**setting.inputs))
        return call, time.perf_counter() - started

    def look() -> tuple[Call, float, Any]:
        call, seconds = first(None)
        seen = None if idle else inspect(call, setting, reference)
        return *(first(setting.backend) if setting.backend else (call, seconds)), seen

    found, refusal = attempt(look)
    if refusal:
        return Program(dataclasses.replace(result, refusal=refusal), lambda **inputs: None)
    call, seconds, own = found
    seen = [s for s in everywhere((*own, seconds) if own else None) if s is not None]
    result = dataclasses.replace(
        result,
        bytes={kind: max(traffic.bytes[kind] for traffic, *_ in seen) for kind in KINDS},
        calls={kind: max(traffic.calls[kind] for traffic, *_ in seen) for kind in KINDS},
        relative_error=max(gap for _, gap, _, _ in seen),
        peak_bytes=tuple(peak for _, _, peak, _ in seen),
        compile_seconds=max(taken for *_, taken in seen),
    )
    if not result.relative_error <= SLACK * TOLERANCE[reference[0].dtype]:
        refusal = f"another result than the model's: relative error {result.relative_error:.1e}"
        return Program(dataclasses.replace(result, refusal=refusal), call)
    return Program(result, call, contender.alone)


def inspect(call: Call, setting: Setting, reference: Sequence[Tensor]) -> tuple[Any, float, int]:
    """(traffic, relative error, peak bytes besides weights and inputs) of one call on this rank."""
    known = [*setting.model.parameters(), *setting.model.buffers(), *setting.inputs.values()]
    counter, live = CollectiveCounter(setting.place.groups["ring"]), LiveBytes([t for t in known if isinstance(t, Tensor)])
    cuda = this_rank().device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with counter, contextlib.nullcontext() if cuda else live:
        outputs = finish(call(**setting.inputs))
    gap = max(difference(value, expected)[1] for value, expected in zip(outputs, reference, strict=True))
    return counter.traffic, gap, torch.cuda.max_memory_allocated() - before if cuda else live.peak


def finish(result: Any) -> list[Tensor]:
    """The tensors of a result, once they are there; diffusers returns before its last gather is done."""
    outputs = [value.wait() if isinstance(value, AsyncCollectiveTensor) else value for value in output_tensors(result)]
    if any(value.device.type == "cuda" for value in outputs):
        torch.cuda.synchronize()
    return outputs


def rotated(count: int, round_number: int) -> list[int]:
    """An order of 0 .. count - 1 for this round: each is first equally often, and has either neighbour before it."""
    start = round_number // 2 % count
    order = [(start + i) % count for i in range(count)]
    return order[:1] + order[:0:-1] if round_number % 2 else order


def time_call(call: Call, inputs: dict[str, Any], *, idle: bool) -> float:
    """Seconds of this rank, from a common start; 0 for a rank that is not needed, which waits for the others."""
    dist.barrier()
    started = time.perf_counter()
    if not idle:
        finish(call(**inputs))
    seconds = 0.0 if idle else time.perf_counter() - started
    dist.barrier()
    return seconds


def time_rounds(programs: Sequence[Program], inputs: dict[str, Any], rounds: int) -> list[tuple[float, ...]]:
    """Per program: milliseconds of the slowest rank, a round each. Collective."""
    seconds = torch.zeros(len(programs), rounds, dtype=torch.float64)
    for number in range(-WARM_UP_ROUNDS, rounds):
        for i in rotated(len(programs), number):
            taken = time_call(programs[i].call, inputs, idle=programs[i].alone and dist.get_rank() > 0)
            if number >= 0:
                seconds[i, number] = taken
    slowest = torch.stack(everywhere(seconds)).amax(0)
    return [tuple(row) for row in (1e3 * slowest).tolist()]


def measure_model(job: Job, name: str, sizes: Sizes) -> list[Timed]:
    """One model at one size; one process first. Collective."""
    device, dtype = this_rank().device, getattr(torch, job.dtype)
    model, inputs = build(name, sizes, str(device), dtype), inputs_of(name, sizes, str(device), dtype)
    reference = finish(model(**inputs))
    places = {mesh: build_mesh(*mesh, device_type=device.type) for mesh in job.meshes}
    programs = []
    for contender, ulysses, ring in job.contenders():
        place = places[job.meshes[0] if contender.alone else (ulysses, ring)]
        programs.append(prepare(contender, Setting(model, inputs, place, job.backend, job.slow_link), reference))
        result = programs[-1].result
        log.debug("  %s: %s", result.name, f"cannot: {result.refusal}" if result.refusal else f"ready after {result.compile_seconds:.1f} s")
    running = [program for program in programs if not program.result.refusal]
    log.debug("  %d rounds of %d programs", job.rounds, len(running))
    times = dict(zip(map(id, running), time_rounds(running, inputs, job.rounds), strict=True))
    return [dataclasses.replace(p.result, milliseconds=times.get(id(p), ())) for p in programs]


def measure(job: Job) -> list[tuple[str, Sizes, list[Timed]]]:
    """Every model at every size, models outermost. Collective."""
    torch.set_num_threads(job.threads)
    progress.show(dist.get_rank())
    cases = [(name, sizes) for name in job.models for sizes in job.sizes]
    found = []
    with torch.no_grad(), adapted(), many_programs(), linked(job.slow_link):
        for number, (name, sizes) in enumerate(cases, 1):
            log.info("%d of %d: %s, %d + %d tokens", number, len(cases), name, sizes.tokens, sizes.text_tokens)
            found.append((name, sizes, measure_model(job, name, sizes)))
    return found
