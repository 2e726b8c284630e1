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
    """A process that forks one child per `run`; one run at a time. It starts with the first run and ends with the context.

    `environment` is that of all children. If this process ends, however it does, so do the server and its child: they see the end of their requests.
    Linux only: the end of a child is waited for by its file descriptor.
    """

    def __init__(self, environment: Mapping[str, str], imports: Sequence[str] = ("torch._dynamo", "pytest")) -> None:
        self._command = [sys.executable, __file__, *imports]
        # Neither the folder of this file nor the current one is where modules are looked for.
        self._environment = {**environment, "PYTHONSAFEPATH": "1"}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()

    def run(self, module: str, arguments: Sequence[str], path: Path, folder: Path, timeout: float) -> tuple[int, str] | None:
        """`python -m module arguments` in `folder`, with `path` the first to import from: (exit status, output), or None after `timeout` seconds.

        A signal that ended the child is a negative status. What the child started has ended, too, when it is None.
        """
        if self._process is None:
            # In a session of its own, so that a signal for the group (Ctrl-C) does not end it before it has ended its child.
            self._process = subprocess.Popen(self._command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
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
            status = wait(child, request["timeout"], requests)
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


def wait(child: int, timeout: float, requests: IO[str]) -> int | None:
    """Its exit status, or None where it had to be ended with all of its group: after `timeout`, or because nobody waits for it any more."""
    descriptor = os.pidfd_open(child)
    ready, _, _ = select.select([descriptor, requests.fileno()], [], [], timeout)  # no second request comes before the reply, so it can only be the end
    os.close(descriptor)
    ended = descriptor in ready
    if not ended:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    for name in sys.argv[1:]:
        __import__(name)
    serve(sys.stdin, sys.stdout)
