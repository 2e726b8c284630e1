"""Calibration: what is computed from times, and one tiny measurement on two ranks."""

import json

import pytest

from seqpar.errors import SeqparError
from seqpar.partitioner.machines import find_machine
from seqpar.tools.calibrate import Sizes, fit, main, measure


def test_delay_and_bandwidth_are_those_of_a_line():
    assert fit([(n, 1e-3 + n / 1e9) for n in (10**9, 10**6, 10)]) == pytest.approx((1e9, 1e-3))
    assert fit([(10, 1e-3), (1000, 5e-4)]) == pytest.approx((2e6, 1e-3), rel=0.01)  # the larger one was faster: noise
    assert fit([(10**6, 1e-3), (2 * 10**6, 2e-3)])[1] == pytest.approx(0.0, abs=1e-9)


def test_impossible_sizes_are_refused():
    for sizes in ({"width": 0}, {"received": (8,)}, {"received": (8, 8)}):
        with pytest.raises(SeqparError, match="must be >= 1"):
            Sizes(**sizes)
    for wrong in (["--ranks", "1"], ["--width", "0"], ["--rounds", "0"]):
        with pytest.raises(SystemExit, match=">= 1"):
            main(wrong)
    with pytest.raises(SeqparError, match="at least 2 ranks"):
        measure(Sizes(), "float32", 1, 1)


@pytest.mark.launches
def test_two_ranks_make_a_profile(tmp_path, capsys):
    path = tmp_path / "machine.json"
    tiny = ["--width", "32", "--tokens", "16", "--heads", "2", "--head-dim", "8", "--received", "64", "65536", "--rounds", "2", "--device", "cpu"]
    assert main([*tiny, "--name", "two processes", "--write", str(path)]) == 0
    machine, measured = find_machine(str(path)), json.loads(path.read_text())["measured"]
    assert machine.name == "two processes" and machine.flops_per_s > 0 and machine.memory_bytes > 1e8
    assert machine.bytes_per_s == measured["links"]["all_to_all"]["bytes_per_s"] > 0
    assert set(measured["links"]) == {"all_to_all", "all_gather", "send_recv"} and measured["ranks"] == 2
    assert min(measured["matmul_flops_per_s"], measured["attention_flops_per_s"]) < machine.flops_per_s < max(measured["matmul_flops_per_s"], measured["attention_flops_per_s"])
    assert "send_recv" in capsys.readouterr().out
