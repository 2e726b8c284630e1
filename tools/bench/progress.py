"""What people see of a run that takes minutes: lines on stderr by the first rank. Models and sizes always, programs on a terminal."""

import logging
import sys

log = logging.getLogger("seqpar.bench")


def show(rank: int) -> None:
    """Lines of INFO (models, sizes) reach stderr, on a terminal those of DEBUG (programs) as well; other ranks than 0 say nothing."""
    log.propagate = False  # other loggers of seqpar may have a handler, and would say it again
    for handler in list(log.handlers):
        log.removeHandler(handler)
    if rank != 0:
        log.setLevel(logging.CRITICAL)
        return
    log.setLevel(logging.DEBUG if sys.stderr.isatty() else logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
