"""`seqpar derive-plan`: the declared plan that is equivalent."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from seqpar.tools.cli import models
from seqpar.tools.cli.command import Command, add_degrees, add_hardware, add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the mesh, whose declarations."""
    models.add_arguments(parser)
    add_degrees(parser)
    parser.add_argument("--style", choices=["sp_plan", "cp_plan"], default="sp_plan", help="vLLM-Omni's declarations (default) or diffusers'")
    add_hardware(parser, "attentions communicate over the mesh, as the degrees say")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the declaration."""
    import seqpar

    named = models.resolve(args)
    found = seqpar.derive_sp_plan(named.model, named.inputs, ulysses=args.ulysses, ring=args.ring, style=args.style, hardware=args.hardware)
    return show(args, seqpar.format_plan(found), plain(found))


def plain(entry: Any) -> Any:
    """The plan as JSON: an entry is an object with its `kind` and fields; indices of outputs become strings."""
    if isinstance(entry, Mapping):
        return {str(key): plain(value) for key, value in entry.items()}
    if isinstance(entry, list | tuple):
        return [plain(value) for value in entry]
    if dataclasses.is_dataclass(entry) and not isinstance(entry, type):
        return {"kind": type(entry).__name__, **{field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}}
    return entry


COMMAND = Command(
    "derive-plan",
    "The smallest declared plan (_sp_plan of vLLM-Omni, _cp_plan of diffusers) that does what the compiler found, or why there is none.",
    ("seqpar derive-plan tiny:pattern-rope --ulysses 2", "seqpar derive-plan tiny:wan --ulysses 2 --height 64 --width 64 --style cp_plan"),
    add_arguments,
    run,
)
