"""`seqpar.config`: settings that change what is written beside the work, never the work."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

ENVIRONMENT = "SEQPAR_DUMP_DIR"
UNSET = object()
_dump_dir: ContextVar[Path | object | None] = ContextVar("seqpar_dump_dir", default=UNSET)


class Config:
    """The settings in force here.

        seqpar.config.dump_dir = "dump"              # from now on, everywhere in this process
        with seqpar.config(dump_dir="other"):        # for a block, in this thread or task
            fast = seqpar.sp_compile(model, inputs, ulysses=2)

    A setting that does not exist cannot be assigned (AttributeError).
    """

    __slots__ = ("_assigned",)

    def __init__(self) -> None:
        self._assigned: Path | object | None = UNSET

    @property
    def dump_dir(self) -> Path | None:
        """Folder for one readable file per pass of every program that is made: that of the innermost `with seqpar.config(dump_dir=…)`, else the one assigned, else SEQPAR_DUMP_DIR.

        None: nothing is written. Assigned within a block, it counts until the block ends. `del` takes an assignment back.
        """
        for setting in (_dump_dir.get(), self._assigned):
            if setting is not UNSET:
                return setting  # type: ignore[return-value]
        from_environment = os.environ.get(ENVIRONMENT)
        return Path(from_environment) if from_environment else None

    @dump_dir.setter
    def dump_dir(self, folder: str | os.PathLike[str] | None) -> None:
        if _dump_dir.get() is UNSET:
            self._assigned = _path(folder)
        else:
            _dump_dir.set(_path(folder))

    @dump_dir.deleter
    def dump_dir(self) -> None:
        self._assigned = UNSET

    @contextlib.contextmanager
    def __call__(self, *, dump_dir: str | os.PathLike[str] | None) -> Iterator[None]:
        """Settings for the time of the block, in this thread or task; None turns dumping off."""
        token = _dump_dir.set(_path(dump_dir))
        try:
            yield
        finally:
            _dump_dir.reset(token)


def _path(folder: str | os.PathLike[str] | None) -> Path | None:
    return None if folder is None else Path(folder)


config = Config()
