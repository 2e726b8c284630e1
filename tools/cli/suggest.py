"""`seqpar suggest`: which mesh to use."""

import argparse

from seqpar.tools.cli import models
from seqpar.tools.cli.command import Command, add_comm_dtype, add_hardware, add_json, comm_dtype, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, how many ranks, and what they are."""
    models.add_arguments(parser)
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks there are")
    add_comm_dtype(parser)
    add_hardware(parser, "H100")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table of meshes."""
    import seqpar

    named = models.resolve(args)
    hardware = {} if args.hardware is None else {"hardware": args.hardware}
    found = seqpar.suggest(named.model, named.inputs, args.world_size, comm_dtype=comm_dtype(args), **hardware)
    return show(args, str(found), found.to_dict())


COMMAND = Command(
    "suggest",
    "Predicted time, bytes and memory of every (ulysses, ring) split of the ranks, and the recommended one.",
    ("seqpar suggest tiny:flux --world-size 4", "seqpar suggest FLUX.1-dev/ --world-size 8 --dtype bfloat16 --hardware L40 --comm-dtype float8_e4m3fn"),
    add_arguments,
    run,
)
