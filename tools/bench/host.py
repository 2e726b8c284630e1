"""Where a benchmark ran: what a reader must know of the machine, and nothing that names it."""

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

BUSY = 0.5  # runnable processes per core, before the benchmark starts its own
PACKAGES = ("seqpar", "torch", "diffusers", "yunchang")


def processor() -> str:
    """The model of the processor, or its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of the packages that take part, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(arguments: Sequence[str], tool: str = "bench") -> dict[str, Any]:
    """JSON-able: machine, versions, command line, and the load just before (runnable processes per core, by the system's one-minute average)."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "command": f"python -m seqpar.tools.{tool} {shlex.join(arguments)}".strip(),
        "processor": processor(),
        "cores": cores,
        "gpus": gpus,
        "load_per_core": round(os.getloadavg()[0] / cores, 2) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
    }


def one_line(host: dict[str, Any]) -> str:
    """For people."""
    where = f"{len(host['gpus'])} x {host['gpus'][0]}, " if host["gpus"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    load = "" if host["load_per_core"] is None else f"; load before: {host['load_per_core']} per core"
    load += " (BUSY, or was within the last minute: times of a busy machine say little)" if (host["load_per_core"] or 0) > BUSY else ""
    return f"{where}{host['cores']} cores of {host['processor']}; {packages}{load}"
