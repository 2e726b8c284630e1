"""Predicted seconds of one node, by hand."""

import pytest

from seqpar.partitioner.cost import OPERATIONS_PER_BYTE, Machine
from seqpar.passes.count import Counts
from seqpar.passes.estimate import LAUNCH_S, node_seconds, transfer_seconds

MACHINE = Machine(flops_per_s=100.0, bytes_per_s=10.0, latency_s=0.5)


def test_on_the_wire():
    assert transfer_seconds(30, 2, MACHINE) == 4.0 and transfer_seconds(0, 0, MACHINE) == 0.0


def test_bound_by_arithmetic_or_by_memory():
    counts = Counts(flops={"product": 500, "thin": 1}, touched={"product": 1, "thin": 10, "sum": 4})
    assert node_seconds(counts, "product", MACHINE) == pytest.approx(5.0 + LAUNCH_S)
    assert node_seconds(counts, "thin", MACHINE) == pytest.approx(10 * OPERATIONS_PER_BYTE / 100.0 + LAUNCH_S)
    assert node_seconds(counts, "sum", MACHINE) == pytest.approx(4 * OPERATIONS_PER_BYTE / 100.0 + LAUNCH_S)
    assert node_seconds(counts, "view", MACHINE) == 0.0
