"""Run one function on every rank: under torchrun, on local processes started here, or in this process alone."""

import contextlib
import datetime
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from seqpar.errors import MeshError, SeqparError

FIRST_ERROR = "first_error"


@dataclass(frozen=True)
class Rank:
    """Where this process stands. Invariants: 0 <= rank < world_size, device names one accelerator or "cpu"."""

    rank: int
    world_size: int
    device: torch.device

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise MeshError(f"rank {self.rank} is not one of {self.world_size} ranks; check RANK and WORLD_SIZE")


class LaunchError(SeqparError):
    """A rank that was started here failed; the message holds what it said."""


def under_launcher() -> bool:
    """True if torchrun (or a launcher that sets the same variables) started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def launch(function: Callable[..., None], args: tuple[Any, ...], *, world_size: int, device_type: str) -> None:
    """Call `function(rank: Rank, *args)` on every rank and wait for all of them.

    Under torchrun this process is one of the ranks. Otherwise `world_size` local processes are started (none for 1), so
    `function` and `args` must be picklable. Inside, the default process group exists unless there is one rank only.
    Raises LaunchError when a local rank fails (the others are ended), MeshError when there are too few accelerators.
    """
    if under_launcher():
        world_size = int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        rank = Rank(int(os.environ["RANK"]), world_size, _device(device_type, local_rank))
        with process_group(rank, "env://"):
            function(rank, *args)
    elif world_size == 1:
        function(Rank(0, 1, _device(device_type, 0)), *args)
    else:
        _check_accelerators(device_type, world_size)
        _share_cores(device_type, world_size)
        with tempfile.TemporaryDirectory(prefix="seqpar-") as folder:
            try:
                mp.spawn(_local_rank, (function, args, world_size, device_type, Path(folder)), nprocs=world_size)
            except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
                first = Path(folder, FIRST_ERROR)
                raise LaunchError(first.read_text() if first.exists() else str(error)) from error


def pick_device_type(wanted: str) -> str:
    """"auto" is the accelerator if this machine has one, else "cpu"; anything else is taken at its word."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def process_group(rank: Rank, init_method: str) -> Iterator[None]:
    """The default process group for the time of the block (the block may destroy it earlier)."""
    cuda = rank.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(rank.device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=init_method,
        rank=rank.rank,
        world_size=rank.world_size,
        device_id=rank.device if cuda else None,
        # The first step compiles; a rank that is late by this much is not coming.
        timeout=datetime.timedelta(minutes=30),
    )
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _local_rank(
    rank: int, function: Callable[..., None], args: tuple[Any, ...], world_size: int, device_type: str, folder: Path
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    here = Rank(rank, world_size, _device(device_type, rank))
    with process_group(here, f"file://{folder}/rendezvous"):
        try:
            function(here, *args)
        except Exception as error:
            # Before the group goes down: then every other rank fails too, maybe sooner than this one is done.
            _note_first_error(error, folder / FIRST_ERROR)
            raise


def _note_first_error(error: Exception, path: Path) -> None:
    """Keep the cause apart from its consequences: the first rank to fail writes the file, the others find it there."""
    message = f"{type(error).__name__}: {error}" if isinstance(error, SeqparError) else traceback.format_exc()
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(message)


def _device(device_type: str, local_rank: int) -> torch.device:
    return torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)


def _check_accelerators(device_type: str, world_size: int) -> None:
    if device_type == "cuda" and torch.cuda.device_count() < world_size:
        raise MeshError(
            f"{world_size} ranks need {world_size} GPUs and this machine has {torch.cuda.device_count()}: "
            "lower --ulysses-degree or --ring-degree, start with torchrun on several machines, or add --device cpu"
        )


def _share_cores(device_type: str, world_size: int) -> None:
    """Ranks on one CPU would each start a thread per core and fight; read by the child processes when they start."""
    if device_type == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
