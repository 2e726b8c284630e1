"""Settings of a process: `seqpar.config`."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

Folder = str | os.PathLike[str] | None
UNSET = Path("\0")  # no folder can be called so
UNCHANGED = UNSET  # of a block


class FolderSetting:
    """An attribute that names a folder: that of the innermost block, else the one assigned, else that of an environment variable.

    None turns it off. Assigned within a block, it counts until the block ends. `del` takes an assignment back.
    """

    def __init__(self, variable: str, doc: str) -> None:
        self.__doc__ = doc
        self.environment = variable
        self.block: ContextVar[Path | None] = ContextVar(variable, default=UNSET)
        self.assigned: Path | None = UNSET

    def __get__(self, instance: object, owner: type | None = None) -> Path | None:
        for folder in (self.block.get(), self.assigned):
            if folder is not UNSET:
                return folder
        from_environment = os.environ.get(self.environment)
        return Path(from_environment) if from_environment else None

    def __set__(self, instance: object, folder: Folder) -> None:
        if self.block.get() is UNSET:
            self.assigned = path_of(folder)
        else:
            self.block.set(path_of(folder))

    def __delete__(self, instance: object) -> None:
        self.assigned = UNSET


class Config:
    """The settings in force here.

        seqpar.config.dump_dir = "dump"              # from now on, everywhere in this process
        with seqpar.config(dump_dir="other"):        # for a block, in this thread or task
            fast = seqpar.sp_compile(model, inputs, ulysses=2)

    A setting that does not exist cannot be assigned (AttributeError).
    """

    __slots__ = ()

    dump_dir = FolderSetting("SEQPAR_DUMP_DIR", "Folder for one readable file per pass of every program that is made; None: nothing is written.")
    cache_dir = FolderSetting("SEQPAR_CACHE_DIR", "Folder where compiled programs are kept for the next start; None: they are not kept.")

    @contextlib.contextmanager
    def __call__(self, *, dump_dir: Folder = UNCHANGED, cache_dir: Folder = UNCHANGED) -> Iterator[None]:
        """Settings for the time of the block, in this thread or task; None turns one off, what is not named stays."""
        named = {"dump_dir": dump_dir, "cache_dir": cache_dir}
        blocks = [(vars(Config)[name].block, path_of(folder)) for name, folder in named.items() if folder is not UNCHANGED]
        tokens = [(block, block.set(folder)) for block, folder in blocks]
        try:
            yield
        finally:
            for block, token in tokens:
                block.reset(token)


def path_of(folder: Folder) -> Path | None:
    return None if folder is None else Path(folder)


config = Config()
