"""`seqpar.config`: settings of what is written beside the work and read back, never of the work."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

Folder = str | os.PathLike[str] | None
# Unset: the environment's.
_dump_dir: ContextVar[Path | None] = ContextVar("SEQPAR_DUMP_DIR")
_cache_dir: ContextVar[Path | None] = ContextVar("SEQPAR_CACHE_DIR")
_UNCHANGED = Path()


class Config:
    """The settings in force here; holds nothing itself.

        with seqpar.config(dump_dir="dump"):
            fast = seqpar.sp_compile(model, inputs, ulysses=2)
    """

    @property
    def dump_dir(self) -> Path | None:
        """Folder for one readable file per pass of every program that is made: the innermost `seqpar.config(dump_dir=…)`, else SEQPAR_DUMP_DIR."""
        return _folder(_dump_dir)

    @property
    def cache_dir(self) -> Path | None:
        """Folder where compiled programs are kept for the next start: the innermost `seqpar.config(cache_dir=…)`, else SEQPAR_CACHE_DIR."""
        return _folder(_cache_dir)

    @contextlib.contextmanager
    def __call__(self, *, dump_dir: Folder = _UNCHANGED, cache_dir: Folder = _UNCHANGED) -> Iterator[None]:
        """Settings for the time of the block, in this thread or task; None turns one off, what is not named stays."""
        given = [(variable, None if folder is None else Path(folder)) for variable, folder in ((_dump_dir, dump_dir), (_cache_dir, cache_dir)) if folder is not _UNCHANGED]
        tokens = [(variable, variable.set(folder)) for variable, folder in given]
        try:
            yield
        finally:
            for variable, token in tokens:
                variable.reset(token)


def _folder(variable: ContextVar[Path | None]) -> Path | None:
    from_environment = os.environ.get(variable.name)
    return variable.get(Path(from_environment) if from_environment else None)


config = Config()
