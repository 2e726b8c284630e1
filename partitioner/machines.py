"""Hardware by name: what one rank of a machine reaches, for predictions (`seqpar.suggest`).

Rates are for 16-bit floating point: about 40 % of the published dense peak, and a third of the published one-way bandwidth of the
link (consumer boards without peer access go through host memory). They rank meshes; they are no benchmark. Where it matters pass a `Machine`, or the path of
a profile that `python -m seqpar.tools.calibrate` has measured.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from seqpar.errors import MeshError
from seqpar.partitioner.cost import Machine

TERA, GIGA = 1e12, 1e9


def _machine(name: str, tflops: float, gigabytes_per_s: float, memory_gigabytes: float, latency_us: float) -> Machine:
    return Machine(
        flops_per_s=tflops * TERA, bytes_per_s=gigabytes_per_s * GIGA, latency_s=latency_us * 1e-6, memory_bytes=memory_gigabytes * GIGA, name=name
    )


#                                     name            TFLOP/s  GB/s   GB  us      dense peak, one-way link
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "H100": _machine("H100, NVLink", 400, 150, 80, 20),  # 989, 450
        "H200": _machine("H200, NVLink", 400, 150, 141, 20),  # 989, 450
        "B200": _machine("B200, NVLink", 900, 300, 180, 20),  # 2250, 900
        "A100": _machine("A100, NVLink", 125, 100, 80, 20),  # 312, 300
        "A100-PCIe": _machine("A100, PCIe 4", 125, 10, 80, 30),  # 312, 32
        "L40": _machine("L40, PCIe 4", 72, 10, 48, 30),  # 181, 32
        "L40S": _machine("L40S, PCIe 4", 145, 10, 48, 30),  # 362, 32
        "RTX 4090": _machine("RTX 4090, PCIe 4, no peer access", 66, 6, 24, 40),  # 165, 32
        "RTX 5090": _machine("RTX 5090, PCIe 5, no peer access", 84, 12, 32, 40),  # 210, 63
    }
)


PROFILE = "seqpar_machine"  # the key that says what a file is; its value is the version of the format
MEASURED = ("flops_per_s", "bytes_per_s", "latency_s", "memory_bytes")


def rates_of(hardware: str | Path | Machine | None) -> Machine | None:
    """What prices communication for hardware that the user named: the machine at its real rates; None for none.

    Raises:
        MeshError: no machine has this name.
    """
    return None if hardware is None else find_machine(hardware).at_real_rates()


def write_rates(machine: Machine | None) -> dict[str, Any] | None:
    """What `rates_of` returned, as plain data."""
    return None if machine is None else {key: value for key, value in asdict(machine).items() if value != math.inf}


def read_rates(data: Any) -> Machine | None:
    """The inverse of `write_rates`.

    Raises:
        ValueError: it is something else.
    """
    if data is None:
        return None
    kinds = {field.name: str if field.name == "name" else float for field in fields(Machine)}
    if not isinstance(data, dict) or not all(key in kinds and isinstance(value, kinds[key]) for key, value in data.items()):
        raise ValueError(f"not the rates of a machine: {data!r:.80}")
    return Machine(**data).at_real_rates()


def find_machine(hardware: str | Path | Machine) -> Machine:
    """The machine called `hardware` (capitals, spaces and a leading "RTX" do not matter), that of a profile `NAME.json`, or the `Machine` given.

    Raises:
        MeshError: no machine has this name (the message lists those that do), or the file is no profile.
    """
    if isinstance(hardware, Machine):
        return hardware
    if isinstance(hardware, Path) or hardware.endswith(".json"):
        return read_machine(Path(hardware))
    known = {_plain(name): machine for name, machine in MACHINES.items()}
    found = known.get(_plain(hardware))
    if found is None:
        near = difflib.get_close_matches(_plain(hardware), known, n=1)
        hint = f"; did you mean {known[near[0]].name.split(',')[0]!r}?" if near else ""
        raise MeshError(f"no hardware profile {hardware!r}{hint or '.'} Known: {', '.join(MACHINES)}. Or pass a seqpar.partitioner.cost.Machine with your own numbers, or a file of python -m seqpar.tools.calibrate")
    return found


def write_machine(path: Path, machine: Machine, measured: Mapping[str, Any] | None = None) -> None:
    """A profile (JSON) that `find_machine` reads. measured: what its numbers come from, for people."""
    numbers = {key: getattr(machine, key) for key in MEASURED if math.isfinite(getattr(machine, key))}
    path.write_text(json.dumps({PROFILE: 1, "name": machine.name, **numbers, "measured": dict(measured or {})}, indent=1))


def read_machine(path: Path) -> Machine:
    """The machine of a profile: operations per second, bytes per second, seconds, bytes. memory_bytes may be missing: unknown.

    Raises:
        MeshError: there is no such file, it is no profile, or a number makes no sense.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MeshError(f"cannot read the hardware profile {path}: {error}") from error
    if not isinstance(data, dict) or data.get(PROFILE) != 1:
        raise MeshError(f"{path} is no hardware profile of this version (no {PROFILE!r}: 1): make one with python -m seqpar.tools.calibrate --write {path.name}")
    numbers: dict[str, Any] = {key: data.get(key) for key in MEASURED if key in data or key != "memory_bytes"}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0 or (value == 0 and key != "latency_s"):
            raise MeshError(f"{path}: {key} must be a positive number, not {value!r}")
    rates: dict[str, Any] = {key: float(value) for key, value in numbers.items()}
    return Machine(name=str(data.get("name", path.stem)), **rates)


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("_", "-").removeprefix("nvidia").removeprefix("rtx")
