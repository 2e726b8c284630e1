"""The command `seqpar`: every subcommand, for people and for programs."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import seqpar
import seqpar.sp_plan
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


class Answer:
    """Stands for what a function of seqpar returns."""

    def __init__(self, *call):
        self.call = call

    def __str__(self):
        return f"answer to {self.call}"

    def to_dict(self):
        return {"call": self.call}


def test_suggest(capsys, monkeypatch):
    monkeypatch.setattr(seqpar, "suggest", lambda model, inputs, world_size, **more: Answer(type(model).__name__, world_size, more), raising=False)
    assert "answer to ('StandardTransformer', 4, {})" in output_of(capsys, "suggest", *SMALL, "--world-size", 4)
    assert json.loads(output_of(capsys, "suggest", *SMALL, "--world-size", 2, "--hardware", "H100", "--json"))["call"][1:] == [2, {"hardware": "H100"}]


def test_derive_plan(capsys, monkeypatch):
    calls = []

    def derive(model, inputs, **options):
        calls.append((sorted(inputs)[0], options))
        return {"rope": {0: SequenceParallelInput(1, 4, split_output=True)}, "proj_out": (SequenceParallelOutput(1), None)}

    monkeypatch.setattr(seqpar, "derive_sp_plan", derive, raising=False)
    data = json.loads(output_of(capsys, "derive-plan", *SMALL, "--ulysses", 2, "--style", "cp_plan", "--json"))
    assert calls == [("hidden_states", {"ulysses": 2, "ring": 1, "style": "cp_plan"})]
    assert data["rope"]["0"] == {"kind": "SequenceParallelInput", "split_dim": 1, "expected_dims": 4, "split_output": True, "auto_pad": False}
    assert data["proj_out"] == [{"kind": "SequenceParallelOutput", "gather_dim": 1, "expected_dims": None}, None]
    text = output_of(capsys, "derive-plan", *SMALL, "--ring", 2)
    name, _, value = text.partition(" = ")
    assert name == "_sp_plan" and eval(value, vars(seqpar.sp_plan)) == derive(None, {"x": 1})


def test_graph(capsys, monkeypatch, tmp_path):
    plan = SimpleNamespace(to_html=lambda path: path.write_text("<html>"), to_dot=lambda: "digraph {}")
    monkeypatch.setattr(seqpar, "plan", lambda *_, **degrees: plan)
    assert f"{tmp_path}/new/plan.html  (6 bytes)" in output_of(capsys, "graph", *SMALL, "--output", tmp_path / "new/plan.html")
    data = json.loads(output_of(capsys, "graph", *SMALL, "--output", tmp_path / "plan.dot", "--json"))
    assert data == {"output": str(tmp_path / "plan.dot"), "bytes": 10} and (tmp_path / "plan.dot").read_text() == "digraph {}"


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
        (["explain", *SMALL, "--ulysses", "64"], "attention heads"),
        (["graph", *SMALL, "--output", "plan.pdf"], "ends in .html or .dot"),
    ):
        assert main(arguments) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("error: ") and message in errors and "Traceback" not in errors
    with pytest.raises(SystemExit):
        main([])
