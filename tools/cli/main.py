"""The command `seqpar`."""

import argparse
import os
import sys
import textwrap

from seqpar import logs
from seqpar.errors import SeqparError
from seqpar.tools.cli import derive_plan, explain, graph, list_models, suggest, text_to_image, verify
from seqpar.tools.cli.command import Command

COMMANDS: tuple[Command, ...] = (
    explain.COMMAND,
    suggest.COMMAND,
    verify.COMMAND,
    derive_plan.COMMAND,
    graph.COMMAND,
    text_to_image.COMMAND,
    list_models.COMMAND,
)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0; 1 after a message on stderr, or where a check failed; 2 (raised by argparse) for bad usage."""
    args = parser().parse_args(argv)
    try:
        logs.configure()
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except SeqparError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `seqpar models | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere, not into another error at exit
        return 1


def parser() -> argparse.ArgumentParser:
    """All commands, each with its examples."""
    top = argparse.ArgumentParser(
        prog="seqpar",
        description="Sequence-parallel programs for PyTorch attention models: look at what would be done, check it, use it.",
        epilog="seqpar COMMAND --help has an example of each. SEQPAR_LOGS=all shows what is going on.",
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        examples = "\n".join(f"  {example}" for example in command.examples)
        one = commands.add_parser(
            command.name,
            help=command.help,
            description=textwrap.fill(command.help, 80),
            epilog=f"example{'s' * (len(command.examples) > 1)}:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(one)
        one.set_defaults(run=command.run)
    return top
