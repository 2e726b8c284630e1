"""What every command of `seqpar` consists of."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Invariants: `help` is one line; `examples` are complete command lines; `run` returns the exit status and raises SeqparError for what the user can mend.
    """

    name: str
    help: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]

    def __post_init__(self) -> None:
        assert self.examples and "\n" not in self.help


def show(args: argparse.Namespace, text: str, data: Any) -> int:
    """Print for people, or with `--json` for programs."""
    print(json.dumps(data, indent=2) if args.json else text)
    return 0


def add_json(parser: argparse.ArgumentParser) -> None:
    """The switch all commands have."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def add_comm_dtype(parser: argparse.ArgumentParser) -> None:
    """What exchanges are rounded to."""
    parser.add_argument("--comm-dtype", choices=["bfloat16", "float8_e4m3fn"], help="queries, keys, values and results of attention travel between ranks rounded to it")


def comm_dtype(args: argparse.Namespace) -> Any:
    """The dtype that was asked for, or None."""
    import torch

    return None if args.comm_dtype is None else getattr(torch, args.comm_dtype)


def add_hardware(parser: argparse.ArgumentParser, default: str) -> None:
    """What the ranks are."""
    parser.add_argument("--hardware", metavar="NAME", help=f"what the ranks are: H100, A100-PCIe, …, or a file of seqpar.tools.calibrate (default: {default})")


def add_degrees(parser: argparse.ArgumentParser) -> None:
    """The mesh."""
    parser.add_argument("--ulysses", type=int, default=1, metavar="U", help="ranks that exchange heads (default 1)")
    parser.add_argument("--ring", type=int, default=1, metavar="R", help="ranks that pass keys and values around (default 1)")
