"""`seqpar derive-plan`: the declared plan that is equivalent."""

import argparse

from seqpar.tools.cli import models
from seqpar.tools.cli.command import Command, add_degrees, add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the mesh, whose declarations."""
    models.add_arguments(parser)
    add_degrees(parser)
    parser.add_argument("--style", choices=["sp_plan", "cp_plan"], default="sp_plan", help="vLLM-Omni's declarations (default) or diffusers'")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the declaration."""
    import seqpar

    named = models.resolve(args)
    found = seqpar.derive_sp_plan(named.model, named.inputs, ulysses=args.ulysses, ring=args.ring, style=args.style)
    return show(args, str(found), found.to_dict())


COMMAND = Command(
    "derive-plan",
    "The smallest declared plan (_sp_plan of vLLM-Omni, _cp_plan of diffusers) that does what the compiler found, or why there is none.",
    ("seqpar derive-plan tiny:wan --ulysses 2 --style cp_plan",),
    add_arguments,
    run,
)
