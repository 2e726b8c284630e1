"""`seqpar text-to-image`: a picture from a pipeline whose denoisers run in parallel."""

import argparse

from seqpar.tools import text_to_image as tool
from seqpar.tools.cli.command import Command


def run(args: argparse.Namespace) -> int:
    """Start the ranks, draw, report."""
    return tool.run(args)


COMMAND = Command(
    "text-to-image",
    "Make a picture or video with a diffusers pipeline on several local processes, or as one rank under torchrun.",
    ('seqpar text-to-image --model tiny:flux --prompt "a lighthouse" --ulysses-degree 2 --width 256 --height 256 --num-inference-steps 4 --compare',),
    tool.add_arguments,
    run,
)
