"""What seqpar logs, and where it goes.

    SEQPAR_LOGS=trace,+solve,-emit python script.py

Loggers are `seqpar.trace`, `seqpar.infer`, `seqpar.solve`, `seqpar.emit` (stages of a compilation), `seqpar.compile` (programs made and reused) and `seqpar.cache`. A name
shows their INFO lines, `+name` DEBUG as well, `-name` errors only; `all` stands for every one, `off` for none. Without SEQPAR_LOGS the stages are shown if stderr is a terminal, by the
first rank. A program that configures `logging` itself gets the lines in its own handlers instead.
"""

import logging
import os
import sys

from seqpar.errors import SeqparError

VARIABLE = "SEQPAR_LOGS"
NAMES = ("trace", "infer", "solve", "emit", "compile", "cache")
LEVELS = {"+": logging.DEBUG, "-": logging.ERROR}


def configure() -> None:
    """Read SEQPAR_LOGS, once per compilation: levels of the loggers, and a handler if nobody has one.

    Raises SeqparError for a name that is not one of the loggers.
    """
    switches = os.environ.get(VARIABLE, "")
    if switches:
        levels = parse(switches)
    elif sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        levels = {name: logging.INFO for name in NAMES if logging.getLogger(f"seqpar.{name}").level == logging.NOTSET}
    else:
        return
    for name, level in levels.items():
        logging.getLogger(f"seqpar.{name}").setLevel(level)
    top = logging.getLogger("seqpar")
    if levels and not top.hasHandlers():
        rank = os.environ.get("RANK")
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"[%(name)s{'' if rank is None else f' rank {rank}'}] %(message)s"))
        top.addHandler(handler)


def parse(switches: str) -> dict[str, int]:
    """The level of every logger named."""
    levels: dict[str, int] = {}
    for switch in filter(None, (part.strip() for part in switches.split(","))):
        sign, name = (switch[0], switch[1:]) if switch[0] in LEVELS else ("", switch)
        if name == "off":
            levels |= dict.fromkeys(NAMES, logging.CRITICAL)
        elif name == "all":
            levels |= dict.fromkeys(NAMES, LEVELS.get(sign, logging.INFO))
        elif name in NAMES:
            levels[name] = LEVELS.get(sign, logging.INFO)
        else:
            raise SeqparError(f"{VARIABLE} names {name!r}; it knows {', '.join(NAMES)}, all and off, each with + (more) or - (errors only) in front")
    return levels
