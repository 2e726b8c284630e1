"""`seqpar explain`: what would be done."""

import argparse

from seqpar.tools.cli import models
from seqpar.tools.cli.command import Command, add_comm_dtype, add_degrees, add_hardware, add_json, comm_dtype, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the mesh."""
    models.add_arguments(parser)
    add_degrees(parser)
    add_comm_dtype(parser)
    add_hardware(parser, "attentions communicate over the mesh, as the degrees say")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    import seqpar

    named = models.resolve(args)
    plan = seqpar.plan(named.model, named.inputs, ulysses=args.ulysses, ring=args.ring, comm_dtype=comm_dtype(args), hardware=args.hardware)
    return show(args, plan.explain(), plan.to_dict())


COMMAND = Command(
    "explain",
    "What is sharded, what is communicated and why; needs no weights, no GPU and no launcher.",
    ("seqpar explain tiny:flux --ulysses 2 --ring 2", "seqpar explain FLUX.1-dev/ --ulysses 4 --ring 2 --height 1024 --width 1024"),
    add_arguments,
    run,
)
