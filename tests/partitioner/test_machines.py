"""Hardware by name."""

import pytest

from seqpar.errors import MeshError
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.machines import MACHINES, find_machine


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
