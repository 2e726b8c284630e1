"""What is said of a machine."""

import json
import platform

from seqpar.tools.bench import host


def test_a_machine_is_described_but_not_named():
    found = host.describe(["--model", "flux", "--json", "a b"])
    assert found["command"] == "python -m seqpar.tools.bench --model flux --json 'a b'" and found["cores"] >= 1
    assert "torch" in found["versions"] and platform.node() not in json.dumps(found)
    assert "BUSY" in host.one_line(found | {"load_per_core": 1.0}) and "BUSY" not in host.one_line(found | {"load_per_core": 0.1})
    line = host.one_line(found)
    assert f"{found['cores']} cores of {host.processor()}" in line and found["versions"]["torch"] in line


def test_gpus_come_first():
    found = host.describe([]) | {"gpus": ["H100", "H100"], "load_per_core": None}
    assert host.one_line(found).startswith("2 x H100, ") and "load" not in host.one_line(found)
