"""A server of forks runs modules as a fresh Python does."""

import os
import subprocess
import sys
import time

import pytest

from seqpar.tools.forks import ForkServer

MODULE = """
import os, subprocess, sys
print(sys.argv[1:], os.getcwd(), os.environ["KEPT"], sys.modules["__main__"].__file__)
print("error", file=sys.stderr)
if "wait" in sys.argv:
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open("started", "w").write(str(started.pid))
    started.wait()
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def server():
    with ForkServer({**os.environ, "KEPT": "kept"}, imports=("json",)) as server:
        yield server


@pytest.mark.parametrize("name", ["first", "second"])
def test_each_child_imports_from_its_own_path(server, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "told.py").write_text(MODULE)
    status, output = server.run("told", ["3", name], folder, tmp_path, timeout=60)
    assert status == 3
    assert output.splitlines() == [f"['3', '{name}'] {tmp_path} kept {folder / 'told.py'}", "error"]


def test_an_exception_is_status_one_and_its_text(server, tmp_path):
    status, output = server.run("not_there", [], tmp_path, tmp_path, timeout=60)
    assert status == 1 and "No module named not_there" in output


def test_what_does_not_end_is_ended_with_what_it_started(server, tmp_path):
    (tmp_path / "told.py").write_text(MODULE)
    assert server.run("told", ["0", "wait"], tmp_path, tmp_path, timeout=3) is None
    assert ends(int((tmp_path / "started").read_text()))
    assert server.run("told", ["0"], tmp_path, tmp_path, timeout=60)[0] == 0


ASKING = """
import os, sys
from pathlib import Path
from seqpar.tools.forks import ForkServer
ForkServer({**os.environ, "KEPT": ""}, imports=()).run("told", ["0", "wait"], Path(sys.argv[1]), Path(sys.argv[1]), 600)
"""


def test_a_child_ends_with_the_process_that_asked_for_it(tmp_path):
    (tmp_path / "told.py").write_text(MODULE)
    asking = subprocess.Popen([sys.executable, "-c", ASKING, str(tmp_path)])
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
        assert asking.poll() is None
        time.sleep(0.1)
    asking.kill()
    asking.wait()
    assert ends(int((tmp_path / "started").read_text()))


def ends(pid):
    for _ in range(100):
        if not running(pid):
            return True
        time.sleep(0.1)
    return False


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
