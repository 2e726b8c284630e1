"""`seqpar verify`: is the parallel program right?"""

import argparse

from seqpar.tools.cli import models
from seqpar.tools.cli.command import Command, add_comm_dtype, add_degrees, add_hardware, add_json, comm_dtype, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the mesh."""
    models.add_arguments(parser)
    add_degrees(parser)
    add_comm_dtype(parser)
    add_hardware(parser, "attentions communicate over the mesh, as the degrees say")
    parser.add_argument("--device", default="cpu", help="where the model computes (default cpu)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if the outputs differ."""
    import seqpar

    named = models.resolve(args, device=args.device)
    report = seqpar.verify(named.model, named.inputs, ulysses=args.ulysses, ring=args.ring, comm_dtype=comm_dtype(args), hardware=args.hardware)
    data = {
        "ok": report.ok,
        "max_abs_err": report.max_abs_err,
        "max_rel_err": report.max_rel_err,
        "tolerance": report.tolerance,
        "first_divergence": report.first_divergence,
        "world_size": report.plan.world_size,
        "sharded_flop_fraction": report.plan.sharded_flop_fraction,
    }
    show(args, f"{named.title}: {report}", data)
    return 0 if report.ok else 1


COMMAND = Command(
    "verify",
    "Run all ranks of the parallel program in this process, with random weights, and compare with the model; status 1 if they differ.",
    ("seqpar verify tiny:qwen-image --ulysses 2 --ring 2", "seqpar verify my_models:Transformer --config tiny.json --inputs inputs.json --ring 4"),
    add_arguments,
    run,
)
