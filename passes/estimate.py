"""Predicted seconds of one call: what was counted, at the rates of a machine.

Contractions at `flops_per_s`, received bytes at `bytes_per_s` plus `latency_s` per collective call. Blocks that travel around a ring are hidden
behind the attention of the block before: of R blocks, R - 1 are attended while another is on its way. Pointwise operators, norms and launch
overhead are left out: they divide by the ranks like the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from seqpar.partitioner.cost import Machine
from seqpar.passes.count import Counts
from seqpar.runtime.counting import KINDS

RING = "ring"
FLOPS_PER_BYTE = 100  # operations that a processor does in the time in which it moves a byte of its memory: 60 to 150 on today's GPUs
LAUNCH_S = 3e-6  # of one operator


def transfer_seconds(received: int, calls: int, machine: Machine) -> float:
    """Time on the wire of `calls` collectives that bring `received` bytes to one rank."""
    return received / machine.bytes_per_s + calls * machine.latency_s


def node_seconds(counts: Counts, name: str, machine: Machine) -> float:
    """Computing time of one node, communication left out: bound by arithmetic or by memory; 0 for views, weights and inputs."""
    work = max(counts.flops.get(name, 0), FLOPS_PER_BYTE * counts.touched.get(name, 0))
    return work / machine.flops_per_s + LAUNCH_S if work else 0.0


def predict(counts: Counts, machine: Machine, nodes: Iterable[str] | None = None) -> Mapping[str, float]:
    """Seconds by "compute", kind of collective, "hidden" (of the ring, behind attention) and "total", of a rank or of some of its nodes."""
    chosen = list(dict.fromkeys((*counts.flops, *counts.received)) if nodes is None else nodes)  # in one order: sums are equal on all ranks
    seconds = dict.fromkeys(("compute", *KINDS, "hidden"), 0.0)
    seconds["compute"] = sum(counts.flops.get(name, 0) for name in chosen) / machine.flops_per_s
    for name in chosen:
        traffic = counts.received.get(name)
        if traffic is None:
            continue
        for kind in KINDS:
            seconds[kind] += transfer_seconds(traffic.bytes[kind], traffic.calls[kind], machine)
        if traffic.calls[RING]:
            attended = counts.flops.get(name, 0) / machine.flops_per_s
            behind = attended * traffic.calls[RING] / (traffic.calls[RING] + 1)
            seconds["hidden"] += min(behind, transfer_seconds(traffic.bytes[RING], traffic.calls[RING], machine))
    seconds["total"] = sum(seconds.values()) - 2 * seconds["hidden"]
    return seconds
