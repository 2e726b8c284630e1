"""Measure a machine, and write a hardware profile that `hardware=` accepts.

    python -m seqpar.tools.calibrate --ranks 2 --write my-machine.json [--device cuda] [--dtype bfloat16]
    torchrun --nproc-per-node 8 -m seqpar.tools.calibrate --write my-machine.json

Computing: matrix products and attention of the sizes given, on every rank at once (they may share what they compute on); the rate of a profile is that of equal shares of
both. Communication: all-to-all, all-gather and exchange with a neighbour across all ranks, at several sizes; a line through the times gives delay and bandwidth. A profile
holds those of the all-to-all. All times are medians of the slowest rank's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from seqpar.errors import SeqparError
from seqpar.launching import launch, pick_device_type, this_rank, under_launcher
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.machines import write_machine
from seqpar.tools.bench.host import describe, one_line

WARM_UP = 3


@dataclass(frozen=True)
class Sizes:
    """width: of square matrix products; tokens, heads, head_dim: of one attention; received: bytes that a rank gets in a collective, ascending.

    Invariants: all >= 1, at least two different sizes of messages.
    """

    width: int = 4096
    tokens: int = 4096
    heads: int = 24
    head_dim: int = 128
    received: tuple[int, ...] = (2**12, 2**20, 2**24, 2**26)

    def __post_init__(self) -> None:
        if min(self.width, self.tokens, self.heads, self.head_dim, *self.received) < 1 or len(set(self.received)) < 2:
            raise SeqparError(f"sizes must be >= 1, and those of messages at least two different ones, got {self}")


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(bytes per second, seconds of delay) of times (bytes, seconds): bandwidth between the two largest messages, delay of the smallest.

    A least-squares line would be decided by the largest message alone, and could have a negative delay.
    """
    points = sorted(points)
    (small, least), (before, shorter), (most, longest) = points[0], points[-2], points[-1]
    # Noise may make the larger message the faster one: then all of its time is bandwidth.
    rate = (most - before) / (longest - shorter) if longest > shorter else most / longest
    return rate, max(least - small / rate, 0.0)


def seconds_of(call: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Median over the rounds of the slowest rank's time, from a common start. Collective."""
    taken = []
    for number in range(-WARM_UP, rounds):
        if dist.is_initialized():
            dist.barrier()
        _synchronise(device)
        started = time.perf_counter()
        call()
        _synchronise(device)
        if number >= 0:
            taken.append(time.perf_counter() - started)
    if not dist.is_initialized():
        return statistics.median(taken)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, taken)
    return statistics.median(max(row) for row in zip(*everywhere, strict=True))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compute_rates(sizes: Sizes, dtype: torch.dtype, rounds: int, device: torch.device) -> dict[str, float]:
    """Operations per second of one rank, a multiply-add counted as two. Collective."""
    a, b = (torch.randn(sizes.width, sizes.width, device=device, dtype=dtype) for _ in range(2))
    q, k, v = (torch.randn(1, sizes.heads, sizes.tokens, sizes.head_dim, device=device, dtype=dtype) for _ in range(3))
    return {
        "matmul_flops_per_s": 2 * sizes.width**3 / seconds_of(lambda: a @ b, rounds, device),
        "attention_flops_per_s": 4 * sizes.heads * sizes.tokens**2 * sizes.head_dim / seconds_of(lambda: F.scaled_dot_product_attention(q, k, v), rounds, device),
    }


def collectives(received: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Every kind of collective, in which a rank receives about this many bytes from others."""
    world, rank = dist.get_world_size(), dist.get_rank()
    each = max(received // (world - 1), 1)
    full, part, whole = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (each * world, each, received))
    out, arrived = torch.empty_like(full), torch.empty_like(whole)

    def neighbours() -> None:
        there, here = (rank + 1) % world, (rank - 1) % world
        for request in dist.batch_isend_irecv([dist.P2POp(dist.isend, whole, there), dist.P2POp(dist.irecv, arrived, here)]):
            request.wait()

    return {
        "all_to_all": lambda: dist.all_to_all_single(out, full),
        "all_gather": lambda: dist.all_gather_into_tensor(out, part),
        "send_recv": neighbours,
    }


def link_rates(sizes: Sizes, rounds: int, device: torch.device) -> dict[str, Any]:
    """Bytes per second and seconds of delay of every kind of collective, and the points they come from. Collective."""
    points: dict[str, list[tuple[int, float]]] = {}
    for received in sizes.received:
        for kind, call in collectives(received, device).items():
            points.setdefault(kind, []).append((received, seconds_of(call, rounds, device)))
    fitted = {kind: fit(found) for kind, found in points.items()}
    return {kind: {"bytes_per_s": rate, "latency_s": delay, "points": points[kind]} for kind, (rate, delay) in fitted.items()}


def memory_bytes(device: torch.device, ranks: int) -> float:
    """Of one rank: its GPU's, or its share of the host's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks


def measure(sizes: Sizes, dtype: str, rounds: int, threads: int) -> dict[str, Any]:
    """On every rank: what was measured, JSON-able. Collective."""
    rank = this_rank()
    if rank.world_size < 2:
        raise SeqparError("collectives need at least 2 ranks: give --ranks, or start with torchrun")
    if rank.device.type == "cpu":
        torch.set_num_threads(threads)
    with torch.no_grad():
        computing = compute_rates(sizes, getattr(torch, dtype), rounds, rank.device)
        links = link_rates(sizes, rounds, rank.device)
    return {**computing, "links": links, "memory_bytes": memory_bytes(rank.device, rank.world_size), "ranks": rank.world_size, "dtype": dtype}


def machine_of(found: dict[str, Any], name: str) -> Machine:
    """The profile: computing at the rate of equal shares of products and attention, communication at that of the all-to-all."""
    link = found["links"]["all_to_all"]
    rate = statistics.harmonic_mean([found["matmul_flops_per_s"], found["attention_flops_per_s"]])
    return Machine(flops_per_s=rate, bytes_per_s=link["bytes_per_s"], latency_s=link["latency_s"], memory_bytes=found["memory_bytes"], name=name)


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{what:22} {found[f'{what}_flops_per_s'] / 1e12:10.3f} TFLOP/s per rank, {found['dtype']}" for what in ("matmul", "attention")]
    lines += [f"{kind:22} {link['bytes_per_s'] / 1e9:10.3f} GB/s to each of {found['ranks']} ranks, {link['latency_s'] * 1e6:.1f} us a call" for kind, link in found["links"].items()]
    return "\n".join([*lines, f"{'memory':22} {found['memory_bytes'] / 1e9:10.1f} GB per rank"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was measured; `--write` makes a profile of it."""
    parser = argparse.ArgumentParser(prog="python -m seqpar.tools.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="local processes to start; under torchrun its own count")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, else float32")
    add("--rounds", type=int, default=20)
    add("--threads", type=int, default=1, help="of every rank, on CPU")
    for name in ("width", "tokens", "heads", "head_dim"):
        add(f"--{name.replace('_', '-')}", type=int, help=f"default {getattr(Sizes(), name)}; on CPU a quarter of the width and tokens, 8 heads")
    add("--received", type=int, nargs="+", metavar="BYTES", default=Sizes().received)
    add("--name", help="of the profile (default: the processor or GPU)")
    add("--write", metavar="FILE.json", help="a profile for hardware=FILE.json")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        found = run(options)
        if under_launcher() and os.environ["RANK"] != "0":
            return 0
        described = describe(given, "calibrate")
        print(f"{one_line(described)}\n{table(found)}")
        if options.write:
            name = options.name or f"{(described['gpus'] or [described['processor']])[0]}, {found['ranks']} ranks"
            write_machine(Path(options.write), machine_of(found, name), measured={**found, "host": described})
    except (SeqparError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for, on ranks that are started here or by torchrun."""
    if options.rounds < 1 or options.ranks < 2 or options.threads < 1:
        raise SeqparError(f"--rounds and --threads must be >= 1 and --ranks >= 2, got {options.rounds}, {options.threads} and {options.ranks}")
    device = pick_device_type(options.device, options.ranks)
    defaults = Sizes() if device == "cuda" else Sizes(width=1024, tokens=1024, heads=8, head_dim=64)
    given = {name: getattr(options, name) for name in ("width", "tokens", "heads", "head_dim") if getattr(options, name) is not None}
    sizes = dataclasses.replace(defaults, **given, received=tuple(options.received))
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    found: dict[str, Any] = launch(measure, options.ranks, sizes, dtype, options.rounds, options.threads, device=device)[0]
    return json.loads(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
