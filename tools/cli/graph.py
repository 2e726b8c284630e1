"""`seqpar graph`: the plan as a picture."""

import argparse
from pathlib import Path

from seqpar.errors import SeqparError
from seqpar.tools.cli import models
from seqpar.tools.cli.command import Command, add_comm_dtype, add_degrees, add_hardware, add_json, comm_dtype, show

FORMATS = (".html", ".svg", ".dot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the mesh, the file."""
    models.add_arguments(parser)
    add_degrees(parser)
    add_comm_dtype(parser)
    add_hardware(parser, "attentions communicate over the mesh, as the degrees say")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".html: one page to look around in; .svg: its pictures; .dot: for graphviz")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the file and say so."""
    import seqpar

    if args.output.suffix not in FORMATS:
        raise SeqparError(f"cannot draw {args.output.name!r}: use a name that ends in {', '.join(FORMATS)}")
    named = models.resolve(args)
    plan = seqpar.plan(named.model, named.inputs, ulysses=args.ulysses, ring=args.ring, comm_dtype=comm_dtype(args), hardware=args.hardware)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.output.suffix == ".html":
        plan.to_html(args.output)
    elif args.output.suffix == ".svg":
        plan.to_svg(args.output)
    else:
        args.output.write_text(plan.to_dot())
    size = args.output.stat().st_size
    return show(args, f"{args.output}  ({size:,} bytes)", {"output": str(args.output), "bytes": size})


COMMAND = Command(
    "graph",
    "Draw the plan: an HTML page without network, an SVG picture, or a DOT file.",
    ("seqpar graph tiny:flux --ulysses 2 --ring 2 --output plan.html", "seqpar graph tiny:wan --ring 2 --output plan.dot"),
    add_arguments,
    run,
)
