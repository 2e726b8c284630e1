"""Predicted seconds of one node: what was counted, at the rates of a machine. `timeline.py` adds them up in the order of a program."""

from __future__ import annotations

from seqpar.partitioner.cost import OPERATIONS_PER_BYTE, Machine
from seqpar.passes.count import Counts

LAUNCH_S = 3e-6  # of one operator


def transfer_seconds(received: int, calls: int, machine: Machine) -> float:
    """Time on the wire of `calls` collectives that bring `received` bytes to one rank."""
    return received / machine.bytes_per_s + calls * machine.latency_s


def node_seconds(counts: Counts, name: str, machine: Machine) -> float:
    """Computing time of one node, communication left out: bound by arithmetic or by memory; 0 for views, weights and inputs."""
    work = max(counts.flops.get(name, 0), OPERATIONS_PER_BYTE * counts.touched.get(name, 0))
    return work / machine.flops_per_s + LAUNCH_S if work else 0.0
