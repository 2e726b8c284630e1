"""Functions on local ranks, under a launcher, and in this process."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from seqpar.errors import MeshError
from seqpar.tools.launch import LaunchError, Rank, launch, pick_device_type

pytestmark = pytest.mark.launches


def note_rank(rank, folder):
    Path(folder, f"{rank.rank}").write_text(f"{rank.world_size} {dist.is_initialized()} {rank.device}")


def test_one_rank_needs_no_process_group(tmp_path):
    launch(note_rank, (tmp_path,), world_size=1, device_type="cpu")
    assert (tmp_path / "0").read_text() == "1 False cpu"


RANK_FUNCTIONS = """
from pathlib import Path
import torch, torch.distributed as dist
from seqpar.errors import MeshError

def note_total(rank, folder):
    total = torch.tensor(rank.rank)
    dist.all_reduce(total)
    Path(folder, str(rank.rank)).write_text(f"{rank.world_size} {total.item()}")

def fail(rank, error):
    if rank.rank == 1:
        raise {"ours": MeshError("only\\nhere"), "other": ZeroDivisionError("oh")}[error]
    dist.barrier()
"""


@pytest.fixture
def rank_functions(tmp_path, monkeypatch):
    """A module that new processes can import; this file is none."""
    (tmp_path / "launch_rank_functions.py").write_text(RANK_FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("launch_rank_functions")
    del sys.modules["launch_rank_functions"]


def test_local_ranks(rank_functions, tmp_path):
    launch(rank_functions.note_total, (tmp_path,), world_size=2, device_type="cpu")
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2 1", "2 1"]


def test_a_failing_rank_ends_the_others(rank_functions):
    with pytest.raises(LaunchError) as caught:
        launch(rank_functions.fail, ("ours",), world_size=2, device_type="cpu")
    assert str(caught.value) == "MeshError: only\nhere"
    with pytest.raises(LaunchError, match="Traceback(.|\n)*ZeroDivisionError: oh"):
        launch(rank_functions.fail, ("other",), world_size=2, device_type="cpu")


def test_too_few_gpus_says_what_to_do():
    count = torch.cuda.device_count() + 2
    with pytest.raises(MeshError, match="--device cpu"):
        launch(print, (), world_size=count, device_type="cuda")


def test_environment_of_a_launcher_is_used(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    launch(note_rank, (tmp_path,), world_size=4, device_type="cpu")
    assert (tmp_path / "0").read_text() == "1 True cpu"
    assert not dist.is_initialized()


def test_rank_invariant_and_device_choice():
    with pytest.raises(MeshError, match="RANK"):
        Rank(4, 4, torch.device("cpu"))
    assert pick_device_type("cpu") == "cpu"
    assert pick_device_type("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
