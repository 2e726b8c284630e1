"""Hardware by name."""

import json
import math

import pytest

from seqpar.errors import MeshError
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.machines import MACHINES, find_machine, rates_of, read_rates, write_machine, write_rates


def test_names_are_forgiving_and_unknown_ones_are_told():
    assert find_machine("h100") is find_machine("H100") is MACHINES["H100"]
    assert find_machine("4090") is find_machine("rtx4090") is MACHINES["RTX 4090"]
    own = Machine(flops_per_s=1.0)
    assert find_machine(own) is own
    with pytest.raises(MeshError, match="no hardware profile 'H10'; did you mean 'H100'.* Known: H100, H200"):
        find_machine("H10")
    with pytest.raises(MeshError, match=r"no hardware profile 'abacus'\. Known: H100"):
        find_machine("abacus")


def test_profiles_are_ordered_as_the_hardware_is():
    h100, a100, l40, rtx = (find_machine(name) for name in ("H100", "A100", "L40", "4090"))
    assert h100.flops_per_s == Machine().flops_per_s and h100.bytes_per_s == Machine().bytes_per_s
    assert h100.flops_per_s > a100.flops_per_s > l40.flops_per_s and h100.bytes_per_s > a100.bytes_per_s > l40.bytes_per_s > rtx.bytes_per_s
    assert len({m.name for m in MACHINES.values()}) == len(MACHINES) and all(m.memory_bytes >= 24e9 for m in MACHINES.values())


def test_a_measured_profile_is_a_machine(tmp_path):
    machine = Machine(flops_per_s=2e12, bytes_per_s=3e9, latency_s=4e-6, memory_bytes=5e9, name="mine")
    path = tmp_path / "mine.json"
    write_machine(path, machine, {"rounds": 3})
    assert find_machine(str(path)) == find_machine(path) == machine and json.loads(path.read_text())["measured"] == {"rounds": 3}
    write_machine(path, Machine())
    assert find_machine(path) == Machine()  # memory unknown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the hardware profile"),
        ("{", "cannot read the hardware profile"),
        ("[]", "is no hardware profile of this version .*seqpar.tools.calibrate"),
        ('{"seqpar_machine": 2}', "is no hardware profile of this version"),
        ('{"seqpar_machine": 1, "flops_per_s": 0, "bytes_per_s": 1, "latency_s": 0}', "flops_per_s must be a positive number, not 0"),
        ('{"seqpar_machine": 1, "flops_per_s": 1, "bytes_per_s": "2", "latency_s": 0}', "bytes_per_s must be a positive number, not '2'"),
        ('{"seqpar_machine": 1, "flops_per_s": 1, "bytes_per_s": 1}', "latency_s must be a positive number, not None"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path, content, message):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MeshError, match=message):
        find_machine(str(path))


def test_rates_of_named_hardware_have_no_caps_and_survive_json():
    assert rates_of(None) is None and write_rates(None) is None and read_rates(None) is None
    machine = rates_of("4090")
    assert math.isinf(machine.comm_share) and math.isinf(machine.call_share) and machine.bytes_per_s == find_machine("4090").bytes_per_s
    for known in (machine, rates_of(Machine())):
        assert read_rates(json.loads(json.dumps(write_rates(known), allow_nan=False))) == known
    for damaged in ([], {"flops_per_s": "fast"}, {"speed": 1.0}):
        with pytest.raises(ValueError, match="not the rates of a machine"):
            read_rates(damaged)
