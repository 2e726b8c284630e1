"""What people see of a compilation: a line per stage, a file per pass."""

import gc
import logging

import pytest
import torch
from torch import nn

import seqpar
from seqpar.passes.pipeline import NORMALISE, TIDY
from seqpar.passes.progress import Dump, collector_paused, run_passes, stage


class Written(nn.Module):
    """Attention written out, which the passes recognise."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return (torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The lines logged while a model was planned twice, and the folder of its dumps."""
    folder, records = tmp_path_factory.mktemp("dump") / "new", []
    top, handler = logging.getLogger("seqpar"), logging.Handler()
    handler.emit = records.append
    top.addHandler(handler)
    before = top.level
    top.setLevel(logging.DEBUG)  # not by assignment: loggers remember what they were enabled for
    with seqpar.config(dump_dir=folder):
        for _ in range(2):
            seqpar.plan(Written(), (torch.ones(1, 12, 8),), ulysses=2)
    top.removeHandler(handler)
    top.setLevel(before)
    seqpar.plan(Written(), (torch.ones(1, 12, 8),), ulysses=2)  # dumps nothing
    return records, folder


def test_one_line_per_stage(seen):
    records, _ = seen
    lines = [(record.name, record.getMessage()) for record in records[: len(records) // 2] if record.levelno == logging.INFO]
    assert [name for name, _ in lines] == ["seqpar.trace", "seqpar.infer", "seqpar.solve", "seqpar.emit"]
    assert lines[0][1] == "tracing Written" and lines[2][1] == "choosing layouts for ulysses 2 x ring 1" and "2 ranks" in lines[3][1]
    ends = [record.getMessage() for record in records if record.levelno == logging.DEBUG and record.name.startswith("seqpar.t")]
    assert len(ends) == 2 and ends[0].startswith("tracing Written: ") and ends[0].endswith(" s")


def test_one_file_per_pass_numbered(seen):
    _, folder = seen
    assert sorted(path.name.partition("_of_rank")[0] for path in folder.iterdir()) == ["2x1_0", "2x1_1"], "a folder per program"
    files = sorted(path for path in next(iter(folder.iterdir())).iterdir())
    names = ["traced", *(rewrite.__name__ for rewrite in (*NORMALISE, *TIDY)), "layouts", "program_of_rank_0", "scheduled_of_rank_0"]
    assert [path.name for path in files] == [f"{i:02}_{name}.txt" for i, name in enumerate(names)]
    traced, *_, layouts, program, _ = (path.read_text() for path in files)
    recognised = next(path.read_text() for path in files if "recognise" in path.name)
    assert traced.startswith("# traced: ") and "torch.ops.aten" in traced
    assert "#   -1 aten._softmax.default" in recognised or "#   -1 aten.softmax.int" in recognised
    assert "#   +1 aten.scaled_dot_product_attention.default" in recognised and "class " in recognised
    assert "linear: " in layouts and "sp" in layouts
    assert "#   +" in program and "seq_to_heads" in program


def test_what_does_not_change_anything_says_so(tmp_path):
    gm = torch.fx.symbolic_trace(nn.ReLU())

    def nothing(gm):
        return gm

    assert run_passes(gm, (nothing,), Dump(tmp_path)) is gm
    assert (tmp_path / "00_nothing.txt").read_text().startswith("# nothing: 1 -> 1 operators\n#   no operator more or fewer")
    assert run_passes(gm, (nothing,), Dump()) is gm


def test_a_stage_that_fails_has_no_end(caplog):
    with caplog.at_level(logging.DEBUG, "seqpar.solve"), pytest.raises(ZeroDivisionError), stage("solve", "dividing by %d", 0):
        _ = 1 / 0
    assert [record.getMessage() for record in caplog.records] == ["dividing by 0"]


def test_the_collector_runs_again_after_a_failure():
    with pytest.raises(ZeroDivisionError), collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled(), "still within the outer pause"
        1 / 0  # noqa: B018
    assert gc.isenabled()
