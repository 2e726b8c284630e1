"""Four real processes in a gloo group that tests send functions to. Run as a script, it is one of the processes."""

import faulthandler
import importlib.util
import multiprocessing.connection as connection
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = Path(__file__).resolve().parent
START_SECONDS = 300
ANSWER_SECONDS = 300  # generous: other tests use the same cores
GRACE_SECONDS = 10  # once one rank has raised: how long the others may take to notice


class NoAnswer(TimeoutError):
    """Stands in the place of a rank that died or did not answer in time."""


class RankPool:
    """`size` processes, started at the first call. Started anew after a timeout or when only some of the ranks failed."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._processes: list[subprocess.Popen] = []
        self._pipes: list[connection.Connection] = []
        self._folder = ""

    def run(self, function: Callable, *args: Any, timeout: float = ANSWER_SECONDS, **kwargs: Any) -> list[Any]:
        """`function(*args, **kwargs)` on every rank; the results in rank order.

        `function` is a module-level function, of the test file itself or of an importable module; arguments and results are
        pickled. The first rank's exception is raised here, with the rank's traceback as a note; TimeoutError after `timeout`.
        """
        outcomes = self.outcomes(function, *args, timeout=timeout, **kwargs)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, NoAnswer))  # a cause before its consequences
        return outcomes

    def outcomes(self, function: Callable, *args: Any, timeout: float = ANSWER_SECONDS, **kwargs: Any) -> list[Any]:
        """Like `run`, but an exception stands in its rank's place instead of being raised."""
        if not self._processes:
            self._start()
        job = pickle.dumps((_address(function), args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        outcomes = self._collect(time.monotonic() + timeout)
        failed = [isinstance(outcome, BaseException) for outcome in outcomes]
        silent = any(isinstance(outcome, NoAnswer) for outcome in outcomes)
        if silent or (any(failed) and not all(failed)):
            self.stop()  # a collective may be half done: the next test gets new processes
        return outcomes

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes, self._pipes = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        address = os.path.join(self._folder, "pool")
        with connection.Listener(address, "AF_UNIX", backlog=self.size) as listener:
            # A rank that dies while it starts must not leave accept() waiting.
            listener._listener._socket.settimeout(START_SECONDS)  # type: ignore[attr-defined]
            command = [sys.executable, __file__, address, str(self.size)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(self.size)}
            self._processes = [
                subprocess.Popen([*command, str(rank)], env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                for rank in range(self.size)
            ]
            pipes = {}
            for _ in range(self.size):
                pipe = listener.accept()
                pipes[pipe.recv()] = pipe
        self._pipes = [pipes[rank] for rank in range(self.size)]

    def _collect(self, deadline: float) -> list[Any]:
        outcomes: dict[int, Any] = {}
        while len(outcomes) < self.size:
            waiting = {self._pipes[rank]: rank for rank in range(self.size) if rank not in outcomes}
            ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                return self._give_up(outcomes)
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                outcomes[rank] = _receive(pipe, rank)
                if isinstance(outcomes[rank], BaseException):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return [outcomes[rank] for rank in range(self.size)]

    def _give_up(self, outcomes: dict[int, Any]) -> list[Any]:
        """Some ranks do not answer: show where they stand, end them, and say so in their places."""
        missing = [rank for rank in range(self.size) if rank not in outcomes]
        for rank in missing:
            self._processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        reason = f"rank(s) {missing} did not answer in time; their stacks are on stderr"
        for outcome in outcomes.values():
            if isinstance(outcome, BaseException):
                outcome.add_note(reason)
        return [outcomes.get(rank, NoAnswer(reason)) for rank in range(self.size)]


def _receive(pipe: Any, rank: int) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        return NoAnswer(f"rank {rank} died without a word")


def _address(function: Callable) -> tuple[str, str]:
    """Where a rank finds the function: (module name, or path of a test file, and the name in it)."""
    if "<" in function.__qualname__:
        raise TypeError(f"{function.__qualname__} cannot be sent to another process: use a module-level function")
    file = Path(function.__code__.co_filename).resolve()
    return (str(file) if TESTS in file.parents else function.__module__), function.__qualname__


def _find(module: str, name: str, loaded: dict[str, ModuleType]) -> Callable:
    if not module.endswith(".py"):
        loaded[module] = importlib.import_module(module)
    elif module not in loaded:  # test files are not importable by name
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        assert spec and spec.loader, module
        loaded[module] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded[module]
        spec.loader.exec_module(loaded[module])
    found: Any = loaded[module]
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _run(job: bytes, loaded: dict[str, ModuleType]) -> bytes:
    try:
        (module, name), args, kwargs = pickle.loads(job)
        return pickle.dumps(_find(module, name, loaded)(*args, **kwargs))
    except BaseException as error:
        text = f"on rank {os.environ['RANK']}:\n{traceback.format_exc()}"
        try:
            error.with_traceback(None).add_note(text)
            pickle.loads(pickle.dumps(error))
            return pickle.dumps(error)
        except Exception:
            return pickle.dumps(RuntimeError(text))


def serve(address: str, size: int, rank: int) -> None:
    """One rank: join the group, then answer jobs until the pool goes away."""
    faulthandler.register(signal.SIGUSR1)
    sys.path.pop(0)  # the tests' folder: its subfolders must not be found as packages
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}.store", rank=rank, world_size=size)
    loaded: dict[str, ModuleType] = {}
    with connection.Client(address, "AF_UNIX") as pipe:
        pipe.send(rank)
        while True:
            try:
                job = pipe.recv_bytes()
            except (EOFError, ConnectionError):
                break
            pipe.send_bytes(_run(job, loaded))
    os._exit(0)  # not destroy_process_group: the other ranks may be gone already


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
