"""`seqpar models`: the families that have a name."""

import argparse
from typing import Any

from seqpar.errors import SeqparError
from seqpar.tools.cli.command import Command, add_json, show


def run(args: argparse.Namespace) -> int:
    """Print a line per family."""
    from seqpar.models import registry

    rows: list[dict[str, Any]] = []
    for name in registry.names():
        try:
            family = registry.get(name)
        except SeqparError as error:
            rows.append({"name": name, "unavailable": str(error)})
            continue
        model = family.build(device="meta")
        rows.append({"name": name, "class": f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}", "native": dict(family.native)})
    return show(args, "\n".join(map(_line, rows)), rows)


def _line(row: dict[str, Any]) -> str:
    if "unavailable" in row:
        return f"{row['name']:<18} {row['unavailable']}"
    sizes = " ".join(f"{key}={value}" for key, value in row["native"].items())
    return f"{row['name']:<18} {row['class']:<44} {sizes}"


COMMAND = Command("models", "The model families that have a name here (tiny:NAME, full:NAME), their classes and published sizes.", ("seqpar models",), add_json, run)
