"""The benchmark from the command line: wrong options, and one tiny run of all programs on two ranks."""

import json

import pytest
import torch

from seqpar.tools.bench.command import main
from seqpar.tools.bench.progress import log

TINY = ["--heads", "2", "--head-dim", "16", "--blocks", "1", "--text-tokens", "8"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mesh", "u2", "u4"],
        ["--rounds", "0"],
        ["--mesh", "q"],
        ["--heads", "0"],
        ["--model", "full:flux"],
        ["--slow-link", "fast"],
        ["--emulate-ranks", "2", "--model", "flux"],
        ["--emulate-ranks", "2", "--model", "tiny:pattern-rope", "--size", "9"],
        ["--emulate-ranks", "1", "--model", "tiny:pattern-rope"],
        ["--read", "nowhere.json"],
    ],
)
def test_wrong_options_are_told(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert str(caught.value.code).startswith("error: ")


# diffusers exchanges lengths on the accelerator that torch was built for, also where there is none.
NEED_A_GPU = {"diffusers anything", "diffusers ring-any"} if torch.accelerator.current_accelerator() and not torch.accelerator.is_available() else set()


@pytest.mark.launches
def test_a_tiny_run(tmp_path, capfd, monkeypatch):
    """Also what is known of the peers: which run on gloo, and how much they exchange."""
    monkeypatch.setitem(__import__("sys").modules, "yunchang", None)  # in this process; the ranks may have it
    path = tmp_path / "bench.json"
    assert main(["--model", "wan", "--mesh", "u2", "r2", "--rounds", "2", "--tokens", "64", *TINY, "--json", str(path), "--write", str(tmp_path / "page.md")]) == 0
    said = capfd.readouterr()  # of the ranks, too
    assert "seqpar u2 / diffusers u2" in said.out and said.err.count("1 of 1: wan, 64 + 8 tokens\n") == 1
    (found,) = json.loads(path.read_text())["runs"]
    programs = {(p["program"], p["ulysses"], p["ring"]): p for p in found["programs"]}
    refused = {key for key, p in programs.items() if p["refusal"]}
    assert {program for program, _, _ in refused} <= {"yunchang"} | NEED_A_GPU
    for key in programs.keys() - refused:
        p = programs[key]
        assert len(p["milliseconds"]) == 2 and min(p["milliseconds"]) > 0 and p["relative_error"] < 1e-5 and p["compile_seconds"] > 0
        assert len(p["peak_bytes"]) == (1 if key[0] == "one process" else 2) and min(p["peak_bytes"]) > 0
        assert sum(p["bytes"].values()) > 0 or key[0] == "one process"
    assert programs["seqpar", 2, 1]["calls"]["all_to_all"] == 2 < programs["diffusers", 2, 1]["calls"]["all_to_all"] == 4
    assert programs["seqpar", 1, 2]["calls"]["ring"] == 1
    assert programs["torch", 1, 2]["bytes"] == {**programs["torch", 1, 2]["bytes"], "ring": 0, "all_to_all": 0}  # it gathers keys and values
    assert "| torch | r2 |" in (tmp_path / "page.md").read_text() and (tmp_path / "page-times-1.svg").exists()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[1]")
    with pytest.raises(SystemExit, match="was not written by --json"):
        main(["--read", str(path)])


def test_emulated_ranks_need_no_other_process(tmp_path, capsys, monkeypatch):
    for name, value in (("level", log.level), ("propagate", True), ("handlers", [])):
        monkeypatch.setattr(log, name, value)
    path = tmp_path / "emulated.json"
    arguments = ["--emulate-ranks", "2", "4", "--mesh", "u2r2", "--model", "tiny:pattern-rope", "--size", "128x128", "--rounds", "2", "--hardware", "A100", "--json", str(path)]
    assert main(arguments) == 0
    (found,) = json.loads(path.read_text())["emulated"]
    said = capsys.readouterr().err
    assert said.startswith("1 of 1: tiny:pattern-rope on cpu, programs of 2, 4 ranks\n  tracing ") and "\n  ulysses 2 x ring 2: writing programs\n" in said and "round" in said
    assert [(row["ulysses"], row["ring"]) for row in found["rows"]] == [(2, 1), (2, 2)] and found["machine"] == "A100, NVLink"
    assert main(["--read", str(path), str(path), "--json", str(tmp_path / "both.json")]) == 0
    assert main(["--read", str(tmp_path / "both.json"), "--write", str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out.count("u2r2") >= 2 and "tiny:pattern-rope at 128x128, float32" in (tmp_path / "page.md").read_text()
