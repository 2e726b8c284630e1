"""Predicted seconds, by hand."""

import pytest

from seqpar.partitioner.cost import Machine
from seqpar.passes.count import Counts
from seqpar.passes.estimate import predict
from seqpar.runtime.counting import KINDS, Traffic

MACHINE = Machine(flops_per_s=100.0, bytes_per_s=10.0, latency_s=0.5)


def traffic(kind, received, calls):
    return Traffic({**dict.fromkeys(KINDS, 0), kind: received}, {**dict.fromkeys(KINDS, 0), kind: calls})


def test_work_wire_and_what_hides_behind_attention():
    counts = Counts(flops={"linear": 200, "ring": 400}, received={"ring": traffic("ring", 20, 1), "gather": traffic("all_gather", 30, 2)})
    found = predict(counts, MACHINE)
    assert found["compute"] == 6.0 and found["ring"] == 2.5 and found["all_gather"] == 4.0
    assert found["hidden"] == 2.0  # of two blocks, the attention of one (half of 4 s) covers the journey of the other
    assert found["total"] == pytest.approx(6.0 + 2.5 + 4.0 - 2.0)
    assert predict(counts, MACHINE, ["linear"])["total"] == 2.0


def test_a_fast_wire_is_hidden_altogether():
    counts = Counts(flops={"ring": 4000}, received={"ring": traffic("ring", 20, 3)})
    found = predict(counts, MACHINE)
    assert found["hidden"] == found["ring"] == 3.5 and found["total"] == found["compute"] == 40.0
