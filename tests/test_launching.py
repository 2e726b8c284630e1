"""Functions on local ranks, under a launcher, and in this process."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed as dist

import seqpar
from seqpar.errors import MeshError, SeqparError
from seqpar.launching import LaunchError, Rank, launch, pick_device_type, this_rank

pytestmark = pytest.mark.launches

RANK_FUNCTIONS = """
import atexit, concurrent.futures, os, threading, time
import torch, torch.distributed as dist
from seqpar.errors import MeshError
from seqpar.launching import this_rank

def total(start, *, step=1):
    total = start + step * torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    here = this_rank()
    return here.rank, here.world_size, str(here.device), total

def fail():
    if dist.get_rank() == 1:
        raise MeshError("only\\nhere")
    dist.barrier()

def sleep(seconds):
    time.sleep(seconds)

class Abort:
    def __del__(self):
        os.abort()

def abort_at_the_end(folder):
    rank = dist.get_rank()
    if rank == 0:
        time.sleep(2)  # another rank leaves first
    globals()["kept"] = Abort()  # as a thread of gloo's does that holds a tensor while the interpreter is taken apart
    atexit.register((folder / f"exit_{rank}").touch)
    threading.Timer(1, (folder / f"thread_{rank}").touch).start()
    return rank

def leave_an_executor(folder):
    rank = dist.get_rank()
    globals()["executor"] = concurrent.futures.ThreadPoolExecutor(2)  # as torch.compile does
    globals()["executor"].submit(time.sleep, 1).add_done_callback(lambda _: (folder / f"done_{rank}").touch())
    return rank

if __name__ == "__main__":
    import json, os, seqpar
    results = seqpar.launch(total, 7, torch.tensor(10), device="cpu")
    if os.environ["RANK"] == "0":
        print(json.dumps([[*where, value.item()] for *where, value in results]))
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """A module that new processes can import; this file is none."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "launched_functions.py").write_text(RANK_FUNCTIONS)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("launched_functions")
    sys.path.remove(str(folder))
    del sys.modules["launched_functions"]


def test_one_rank_is_this_process():
    assert seqpar.launch(lambda x, y: (x + y, dist.is_initialized(), this_rank().rank), 1, 2, device="cpu", y=3) == [(5, False, 0)]


def test_a_rank_that_has_returned_may_not_fail_at_its_end(functions, tmp_path):
    assert seqpar.launch(functions.abort_at_the_end, 2, tmp_path, device="cpu") == [0, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"exit_0", "exit_1", "thread_0", "thread_1"}  # what was begun is finished


def test_threads_that_wait_for_work_do_not_keep_a_rank(functions, tmp_path):
    assert seqpar.launch(functions.leave_an_executor, 2, tmp_path, device="cpu", timeout_s=60) == [0, 1]
    assert len(list(tmp_path.iterdir())) == 2  # what was begun is finished


def test_local_ranks_return_their_results_in_order(functions):
    results = seqpar.launch(functions.total, 2, torch.tensor(10), device="cpu", step=4)
    assert results == [(0, 2, "cpu", torch.tensor(24)), (1, 2, "cpu", torch.tensor(24))]
    assert not dist.is_initialized()


def test_a_failing_rank_ends_the_others_and_shows_its_traceback(functions):
    with pytest.raises(LaunchError, match="(?s)rank 1 failed:.*Traceback.*in fail\n.*MeshError: only\nhere") as caught:
        launch(functions.fail, 2, device="cpu")
    assert caught.value.rank == 1 and caught.value.cause == "MeshError: only\nhere" and caught.value.expected


def test_time_up_is_an_error(functions):
    started = time.monotonic()
    with pytest.raises(LaunchError, match=r"\[0, 1\] are not done after 1 s"):
        launch(functions.sleep, 2, 600, device="cpu", timeout_s=1)
    assert time.monotonic() - started < 120


def test_what_cannot_be_sent_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(SeqparError, match="lambda.*pip install cloudpickle"):
        launch(lambda: 1, 2, device="cpu")

    def typed():
        return 1

    typed.__module__, typed.__qualname__ = "__main__", "typed"
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(SeqparError, match="cannot send typed"):
        launch(typed, 2, device="cpu")


def test_lambdas_with_cloudpickle():
    pytest.importorskip("cloudpickle")
    offset = 5
    assert launch(lambda x: x + offset + dist.get_rank(), 2, 1, device="cpu") == [6, 7]


def test_under_torchrun_the_launcher_counts(functions):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", functions.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0, 2, "cpu", 21], [1, 2, "cpu", 21]]


def test_environment_of_a_launcher_is_used(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    assert launch(lambda: (dist.get_world_size(), str(this_rank().device)), 4, device="cpu") == [(1, "cpu")]
    assert not dist.is_initialized()
    # A function may take the group down, so that rank 0 goes on alone.
    assert launch(dist.destroy_process_group, 1, device="cpu") == [None]


def run_script(folder, text, **environment):
    """What a script of a user's prints."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=600, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the names of threads in /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that lets go of a tensor while the interpreter is being taken apart aborts a process that has finished."""
    text = """
    import importlib, os, torch, seqpar
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    def gloo():
        names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
        return sum("gloo" in name for name in names)
    def job():
        mesh = init_device_mesh("cpu", (1,))
        importlib.import_module("torch._dynamo")  # as tracing does
        dist.all_reduce(torch.ones(3), group=mesh.get_group())
        before = gloo()
        dist.destroy_process_group()
        return before
    (before,) = seqpar.launch(job, 1, device="cpu")
    print(before > 0, gloo())
    """
    assert run_script(tmp_path, text, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0") == ["True", "0"]


def test_a_script_may_mention_torch_ops(tmp_path):
    text = """
    import torch, seqpar
    def job():
        return int(torch.ops.aten.add(torch.ones(()), 2.0))
    if __name__ == "__main__":
        print(*seqpar.launch(job, 2, device="cpu"))
    """
    assert run_script(tmp_path, text) == ["3", "3"]


def test_no_rank_is_refused():
    with pytest.raises(MeshError, match="nproc must be an integer >= 1, not 0"):
        launch(print, 0)


def test_too_few_gpus_says_what_to_do():
    with pytest.raises(MeshError, match="device"):
        launch(print, torch.cuda.device_count() + 2, device="cuda")


def test_rank_invariant_and_device_choice():
    with pytest.raises(MeshError, match="RANK"):
        Rank(4, 4, torch.device("cpu"))
    assert pick_device_type("cpu") == "cpu"
    assert pick_device_type("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device_type("auto", 1000) == "cpu"
