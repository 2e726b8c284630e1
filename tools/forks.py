"""Modules run by children of a process that has made the slow imports once: `ForkServer` starts it and asks it.

The server is this file run as a script. It imports nothing of the package, so that each child imports the copy that it is told to.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


class ForkServer:
    """A process that forks one child per `run`; one run at a time. Used as a context, which ends the process (not a child that runs).

    `environment` is that of all children. Linux only: the end of a child is waited for by its file descriptor.
    """

    def __init__(self, environment: Mapping[str, str], imports: Sequence[str] = ("torch._dynamo", "pytest")) -> None:
        command = [sys.executable, __file__, *imports]
        # Neither the folder of this file nor the current one is where modules are looked for.
        self._process = subprocess.Popen(command, env={**environment, "PYTHONSAFEPATH": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, module: str, arguments: Sequence[str], path: Path, folder: Path, timeout: float) -> tuple[int, str] | None:
        """`python -m module arguments` in `folder`, with `path` the first to import from: (exit status, output), or None after `timeout` seconds.

        A signal that ended the child is a negative status. What the child started has ended, too, when it is None.
        """
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None and replies is not None
        request = {"module": module, "arguments": list(arguments), "path": str(path), "folder": str(folder), "timeout": timeout}
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        reply = json.loads(replies.readline())
        return None if reply["status"] is None else (reply["status"], reply["output"])


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until there are no more. Returns in each child as well, with its module run."""
    for line in iter(requests.readline, ""):
        request = json.loads(line)
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                become(request, output.fileno())
                return
            status = wait(child, request["timeout"])
            output.seek(0)
            print(json.dumps({"status": status, "output": output.read().decode(errors="replace")}), file=replies, flush=True)


def become(request: Mapping[str, object], output: int) -> None:
    """Run the module of a request in this process, which leads a group of its own."""
    os.setsid()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(str(request["folder"]))
    path, module, arguments = request["path"], request["module"], request["arguments"]
    assert isinstance(path, str) and isinstance(module, str) and isinstance(arguments, list)
    os.environ["PYTHONPATH"] = path
    os.environ.pop("PYTHONSAFEPATH", None)
    sys.path.insert(0, path)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def wait(child: int, timeout: float) -> int | None:
    """Its exit status, or None where it had to be ended with all of its group."""
    descriptor = os.pidfd_open(child)
    ended, _, _ = select.select([descriptor], [], [], timeout)
    os.close(descriptor)
    if not ended:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    for name in sys.argv[1:]:
        __import__(name)
    serve(sys.stdin, sys.stdout)
