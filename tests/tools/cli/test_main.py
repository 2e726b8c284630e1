"""The command `seqpar`: every subcommand, for people and for programs."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import seqpar
from seqpar.sp_plan import SequenceParallelInput, SequenceParallelOutput
from seqpar.tools.cli.main import COMMANDS, main, parser

SMALL = ["tiny:pattern-standard", "--height", "64", "--width", "64"]


def output_of(capsys, *arguments, status=0):
    assert main([str(argument) for argument in arguments]) == status
    return capsys.readouterr().out


def test_the_commands():
    assert [c.name for c in COMMANDS] == ["explain", "suggest", "verify", "derive-plan", "graph", "text-to-image", "models"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_has_examples_that_parse_and_json(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command.name, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "--json" in text
    for example in command.examples:
        assert example in text
        program, *arguments = shlex.split(example)
        assert program == "seqpar" and parser().parse_args(arguments).run is command.run


def test_a_reader_that_closes_early_is_no_error():
    """`seqpar models | head -1`: no traceback."""
    command = f"{sys.executable} -m seqpar.tools.cli models --json"
    done = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[\n" and done.stderr == ""


def test_documented_lines_parse():
    root = Path(__file__).parents[3]
    lines = [line.strip() for name in ("docs/cli.md", "README.md") for line in root.joinpath(name).read_text().replace("\\\n", "").splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("seqpar ") and "MODEL" not in line]
    assert {command[0] for command in commands} == {command.name for command in COMMANDS}
    for command in commands:
        parser().parse_args(command)


def test_explain(capsys):
    text = output_of(capsys, "explain", *SMALL, "--ulysses", 2)
    assert text.startswith("seqpar: 2 rank(s) = ulysses 2 x ring 1") and "attention" in text
    data = json.loads(output_of(capsys, "explain", *SMALL, "--ring", 2, "--json"))
    assert data["ring"] == 2 and data["sharded_flop_fraction"] > 0.8


def test_verify(capsys, monkeypatch):
    assert ": ok: relative error" in output_of(capsys, "verify", *SMALL, "--ulysses", 2)
    report = SimpleNamespace(ok=False, max_abs_err=1.0, max_rel_err=2.0, first_divergence="mm", tolerance=1e-5, plan=SimpleNamespace(world_size=2, sharded_flop_fraction=0.9))
    monkeypatch.setattr(seqpar, "verify", lambda *_, **degrees: report)
    data = json.loads(output_of(capsys, "verify", *SMALL, "--ring", 2, "--json", status=1))
    assert data["ok"] is False and data["first_divergence"] == "mm" and data["world_size"] == 2


def test_suggest(capsys):
    text = output_of(capsys, "suggest", *SMALL, "--world-size", 2)
    assert text.startswith("2 ranks, H100") and "ulysses 1 x ring 2" in text and text.endswith("recommended: stay on one device\n")
    data = json.loads(output_of(capsys, "suggest", *SMALL, "--world-size", 2, "--hardware", "rtx4090", "--json"))
    assert data["machine"]["name"].startswith("RTX 4090") and [(row["ulysses"], row["ring"]) for row in data["rows"]] == [(1, 1), (2, 1), (1, 2)]
    assert data["best"] == data["rows"][0] and all(row["received"] > 0 for row in data["rows"][1:])


def test_derive_plan_for_a_machine_on_which_so_little_is_not_worth_an_exchange(capsys):
    assert main(["derive-plan", "tiny:pattern-unified", *SMALL[1:], "--ulysses", "2", "--hardware", "H100"]) == 1
    assert "the compiler exchanges no attention" in capsys.readouterr().err


def test_derive_plan(capsys):
    written = {}
    exec(output_of(capsys, "derive-plan", *SMALL, "--ring", 2), written)
    assert written["_sp_plan"] == {"blocks.0": {"x_BSC": SequenceParallelInput(1, 3)}, "proj_out": SequenceParallelOutput(1, 3)}
    data = json.loads(output_of(capsys, "derive-plan", "tiny:pattern-unified", *SMALL[1:], "--ulysses", 2, "--json"))
    table = {"kind": "SequenceParallelInput", "split_dim": 1, "expected_dims": 3, "split_output": False, "auto_pad": False}
    assert data["blocks.*"] == {"tables": [table, table]} and data["blocks.0"] == {"x_BSC": table}
    assert data["blocks.1"] == {"kind": "SequenceParallelOutput", "gather_dim": 1, "expected_dims": 3}


def test_graph(capsys, tmp_path):
    page, picture, dot = tmp_path / "new" / "plan.html", tmp_path / "plan.svg", tmp_path / "plan.dot"
    assert output_of(capsys, "graph", *SMALL, "--ulysses", 2, "--output", page) == f"{page}  ({page.stat().st_size:,} bytes)\n"
    assert "<svg" in page.read_text() and "seq_to_heads" in page.read_text()
    output_of(capsys, "graph", *SMALL, "--ulysses", 2, "--output", picture)
    assert picture.read_text().startswith("<svg") and "seq_to_heads" in picture.read_text()
    data = json.loads(output_of(capsys, "graph", *SMALL, "--ring", 2, "--output", dot, "--json"))
    assert data == {"output": str(dot), "bytes": dot.stat().st_size} and dot.read_text().startswith("digraph")


def test_text_to_image(capsys, monkeypatch):
    monkeypatch.setattr("seqpar.tools.text_to_image.run", lambda args: print(args.model, args.json) or 3)
    assert output_of(capsys, "text-to-image", "--model", "tiny:flux", "--prompt", "x", "--json", status=3) == "tiny:flux True\n"


def test_models(capsys):
    lines = output_of(capsys, "models").splitlines()
    assert any(line.split()[:2] == ["flux", "diffusers.FluxTransformer2DModel"] for line in lines)
    rows = json.loads(output_of(capsys, "models", "--json"))
    assert {"name": "flux", "class": "diffusers.FluxTransformer2DModel", "native": {"height": 1024, "width": 1024, "text_len": 512}} in rows


def test_errors_are_one_line(capsys, tmp_path):
    for arguments, message in (
        (["explain", "tiny:nonsense"], "no model family 'nonsense'"),
        (["graph", *SMALL, "--output", "plan.pdf"], "ends in .html, .svg, .dot"),
        (["derive-plan", *SMALL], "one rank has nothing to split"),
        (["derive-plan", *SMALL, "--ulysses", "2", "--style", "cp_plan"], "a cp_plan is for models of diffusers"),
        (["suggest", *SMALL, "--world-size", "0"], "world_size must be an integer >= 1, not 0"),
        (["suggest", *SMALL, "--world-size", "2", "--hardware", "abacus"], "no hardware profile 'abacus'"),
    ):
        assert main(arguments) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("error: ") and message in errors and "Traceback" not in errors
    with pytest.raises(SystemExit):
        main([])
