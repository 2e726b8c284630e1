"""`seqpar.config`: settings that change what is written beside the work, never the work."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

ENVIRONMENT = "SEQPAR_DUMP_DIR"
_dump_dir: ContextVar[Path | None] = ContextVar("seqpar_dump_dir")  # unset: the environment's


class Config:
    """The settings in force here; holds nothing itself.

        with seqpar.config(dump_dir="dump"):
            fast = seqpar.sp_compile(model, inputs, ulysses=2)
    """

    @property
    def dump_dir(self) -> Path | None:
        """Folder for one readable file per pass of every program that is made: the innermost `seqpar.config(dump_dir=…)`, else SEQPAR_DUMP_DIR."""
        from_environment = os.environ.get(ENVIRONMENT)
        return _dump_dir.get(Path(from_environment) if from_environment else None)

    @contextlib.contextmanager
    def __call__(self, *, dump_dir: str | os.PathLike[str] | None) -> Iterator[None]:
        """Settings for the time of the block, in this thread or task; None turns dumping off."""
        token = _dump_dir.set(None if dump_dir is None else Path(dump_dir))
        try:
            yield
        finally:
            _dump_dir.reset(token)


config = Config()
