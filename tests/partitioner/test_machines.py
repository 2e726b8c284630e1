"""Hardware by name."""

import json
import math

import pytest

from seqpar.errors import MeshError
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.machines import MACHINES, find_machine, rates_of, read_rates, write_rates


def test_names_are_forgiving_and_unknown_ones_are_told():
    assert find_machine("h100") is find_machine("H100") is MACHINES["H100"]
    assert find_machine("4090") is find_machine("rtx4090") is MACHINES["RTX 4090"]
    own = Machine(flops_per_s=1.0)
    assert find_machine(own) is own
    with pytest.raises(MeshError, match="no hardware profile 'H10'; did you mean 'H100'.* Known: H100, H200"):
        find_machine("H10")


def test_profiles_are_ordered_as_the_hardware_is():
    h100, a100, l40, rtx = (find_machine(name) for name in ("H100", "A100", "L40", "4090"))
    assert h100.flops_per_s == Machine().flops_per_s and h100.bytes_per_s == Machine().bytes_per_s
    assert h100.flops_per_s > a100.flops_per_s > l40.flops_per_s and h100.bytes_per_s > a100.bytes_per_s > l40.bytes_per_s > rtx.bytes_per_s
    assert len({m.name for m in MACHINES.values()}) == len(MACHINES) and all(m.memory_bytes >= 24e9 for m in MACHINES.values())


def test_rates_of_named_hardware_have_no_caps_and_survive_json():
    assert rates_of(None) is None and write_rates(None) is None and read_rates(None) is None
    machine = rates_of("4090")
    assert math.isinf(machine.comm_share) and math.isinf(machine.call_share) and machine.bytes_per_s == find_machine("4090").bytes_per_s
    for known in (machine, rates_of(Machine())):
        assert read_rates(json.loads(json.dumps(write_rates(known), allow_nan=False))) == known
    for damaged in ([], {"flops_per_s": "fast"}, {"speed": 1.0}):
        with pytest.raises(ValueError, match="not the rates of a machine"):
            read_rates(damaged)
