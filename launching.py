"""`seqpar.launch`: run one function on every rank, on local processes started here, under torchrun, or in this process alone."""

import atexit
import contextlib
import datetime
import gc
import importlib
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  its arguments default to the group there is when it is first imported: none, so that no group outlives its end
import torch.multiprocessing as mp

from seqpar.errors import MeshError, SeqparError
from seqpar.runtime.mesh import check_degrees

FIRST_ERROR = "first_error"
POLL_S = 1.0


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
    """A rank that was started here failed. The text holds its traceback; `rank` says which, `cause` is the last line of it."""

    def __init__(self, message: str, rank: int | None = None, cause: str = "", expected: bool = False) -> None:
        super().__init__(message)
        self.rank, self.cause = rank, cause or message
        self.expected = expected  # the rank raised a SeqparError, whose text is enough


def launch(function: Callable[..., Any], nproc: int, *args: Any, device: str = "auto", timeout_s: float | None = None, **kwargs: Any) -> list[Any]:
    """Call `function(*args, **kwargs)` on `nproc` ranks and return what each returned, in rank order.

        losses = seqpar.launch(train, 4, "cpu")

    Local processes are started (none for 1), with the default process group: nccl and a GPU each, or gloo. Under torchrun (or accelerate launch) this
    process is one of the ranks already, and the launcher's number of processes counts. `this_rank()` tells a function where it is.

    Args:
        function: with its arguments it is sent to other processes: a function of a module or script. With the package cloudpickle installed also a lambda, a local
            function, or one typed into a notebook.
        device: "cpu", "cuda", or "auto": "cuda" if this machine has as many GPUs as ranks.
        timeout_s: seconds after which all are ended.

    Returns:
        The results; tensors come back on the CPU. Under a launcher, the own result alone if `function` took the process group down.

    Raises:
        LaunchError: a rank failed (the others are ended; the text has its traceback), or the time is up.
        MeshError: `nproc` is not a positive integer, or there are fewer GPUs than ranks.
        SeqparError: `function` or its arguments cannot be sent.
    """
    if under_launcher():
        rank = _rank_of_launcher(device)
        with process_group(rank, "env://"):
            return _gathered(function(*args, **kwargs), rank.world_size)
    check_degrees(nproc=nproc)
    device = pick_device_type(device, nproc)
    if nproc == 1:
        if device == "cuda":
            torch.cuda.init()  # so that this_rank() says so
        return [function(*args, **kwargs)]
    _check_accelerators(device, nproc)
    job = _pickled(function, args, kwargs)
    with tempfile.TemporaryDirectory(prefix="seqpar-") as name, _shared_cores(device, nproc):
        folder = Path(name)
        try:
            context = mp.spawn(_local_rank, (job, nproc, device, folder), nprocs=nproc, join=False)
            _join(context, timeout_s)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise _first_error(folder, error) from None
        return [torch.load(folder / f"result_{rank}", map_location="cpu", weights_only=False) for rank in range(nproc)]


def under_launcher() -> bool:
    """True if torchrun (or a launcher that sets the same variables) started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def this_rank() -> Rank:
    """Where this process stands, inside a launched function; rank 0 of 1 elsewhere. The device is the one its process group communicates on."""
    if not dist.is_initialized():
        return Rank(0, 1, torch.device("cuda", 0) if torch.cuda.is_initialized() else torch.device("cpu"))
    cuda = "nccl" in str(dist.get_backend())
    return Rank(dist.get_rank(), dist.get_world_size(), torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"))


def pick_device_type(wanted: str, nproc: int = 1) -> str:
    """"auto" is "cuda" if this machine has a GPU for each of `nproc` ranks, else "cpu"; anything else is taken at its word."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= nproc else "cpu"


@contextlib.contextmanager
def process_group(rank: Rank, init_method: str) -> Iterator[None]:
    """The default process group for the time of the block (the block may destroy it earlier); one that is there already is used and stays.

    Afterwards its threads have ended, unless something still refers to it: a process that ended under them would be aborted (`_leave` says why).
    """
    if dist.is_initialized():
        yield
        return
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
        gc.collect()  # meshes are cycles, and a group that nothing refers to waits for its threads


def _rank_of_launcher(device: str) -> Rank:
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    kind = pick_device_type(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _device(kind, local_rank))


def _gathered(result: Any, world_size: int) -> list[Any]:
    if not dist.is_initialized():
        return [result]
    results = [result] * world_size
    dist.all_gather_object(results, result)
    return results


def _pickled(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """The call as bytes. What plain pickle sends by name only must be importable in the new process; cloudpickle sends the code."""
    job = (function, args, kwargs)
    typed = getattr(function, "__module__", None) == "__main__" and not hasattr(sys.modules["__main__"], "__file__")
    try:
        cloudpickle = importlib.import_module("cloudpickle")
    except ImportError:
        cloudpickle = None
    failures = (pickle.PicklingError, AttributeError, TypeError)
    unsent: Exception | None = None
    if cloudpickle is not None:
        try:
            return cloudpickle.dumps(job)
        except failures as error:  # it takes torch.ops, where a script mentions it, for a value
            unsent = error
    if not typed:
        with contextlib.suppress(*failures):
            return pickle.dumps(job)
    if unsent is not None:
        raise SeqparError(f"launch cannot send the function's call to other processes: {unsent}") from unsent
    name = getattr(function, "__qualname__", repr(function))
    raise SeqparError(
        f"launch cannot send {name} (or an argument) to other processes: put it into a .py file and import it from there, or pip install cloudpickle, "
        "which can send lambdas, local functions and those typed into a notebook"
    )


def _local_rank(rank: int, job: bytes, world_size: int, device_type: str, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    here = Rank(rank, world_size, _device(device_type, rank))
    with process_group(here, f"file://{folder}/rendezvous"):
        try:
            function, args, kwargs = pickle.loads(job)
            torch.save(function(*args, **kwargs), folder / f"result_{rank}")
        except BaseException as error:
            # Before the group goes down: then every other rank fails too, maybe sooner than this one is done.
            _note_first_error(error, rank, folder / FIRST_ERROR)
            raise
    _leave()


def _leave() -> None:
    """End this process once its result is written, with what Python does at the end except taking the interpreter apart.

    Threads of gloo's that live as long as anything refers to a group may then let go of tensors, for which they need the interpreter, and abort the process
    (pytorch#179291). The launcher would take that for a failure of the rank, and end the others.
    """
    # Tells executors to let their threads go, and waits for all threads; by themselves those of an executor wait for work forever.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _note_first_error(error: BaseException, rank: int, path: Path) -> None:
    """Keep the cause apart from its consequences: the first rank to fail writes the file, the others find it there."""
    cause = f"{type(error).__name__}: {error}"
    note = (f"rank {rank} failed:\n{traceback.format_exc()}", rank, cause, isinstance(error, SeqparError))
    with contextlib.suppress(FileExistsError), path.open("xb") as file:
        pickle.dump(note, file)


def _first_error(folder: Path, error: Exception) -> LaunchError:
    path = folder / FIRST_ERROR
    return LaunchError(*pickle.loads(path.read_bytes())) if path.exists() else LaunchError(f"a rank ended without a result: {error}")


def _join(context: Any, timeout_s: float | None) -> None:
    """Wait for all processes; `context.join` ends the others when one has failed."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        while not context.join(timeout=POLL_S):
            if deadline is not None and time.monotonic() > deadline:
                running = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                raise LaunchError(f"rank(s) {running} are not done after {timeout_s:g} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _device(device_type: str, local_rank: int) -> torch.device:
    return torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)


def _check_accelerators(device_type: str, world_size: int) -> None:
    if device_type == "cuda" and torch.cuda.device_count() < world_size:
        raise MeshError(
            f"{world_size} ranks need {world_size} GPUs and this machine has {torch.cuda.device_count()}: "
            "use fewer ranks (lower degrees), start with torchrun on several machines, or choose the CPU (--device cpu, device=\"cpu\")"
        )


@contextlib.contextmanager
def _shared_cores(device_type: str, world_size: int) -> Iterator[None]:
    """Ranks on one CPU would each start a thread per core and fight; read by the child processes when they start."""
    name = "OMP_NUM_THREADS"
    if device_type != "cpu" or name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, (os.cpu_count() or 1) // world_size))
    try:
        yield
    finally:
        del os.environ[name]
