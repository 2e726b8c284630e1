"""The benchmark: what it computes from times, and one tiny run on two ranks."""

import json

import pytest

from seqpar.errors import SeqparError
from seqpar.tools import bench, bench_report
from seqpar.tools.bench_report import ONE, OURS, PEER, Spread, Timed, mesh_name, parse_mesh
from seqpar.tools.sized_models import Sizes

TIMED = [
    Timed(ONE, 1, 1, (10.0, 20.0, 30.0), peak_bytes=(1, 0)),
    Timed(PEER, 2, 1, (6.0, 10.0, 20.0), peak_bytes=(1, 1)),
    Timed(OURS, 2, 1, (5.0, 12.0, 15.0), peak_bytes=(1, 1)),
    Timed(PEER, 1, 2, refusal="RuntimeError: uneven"),
    Timed(OURS, 1, 2, (4.0, 9.0, 12.0), peak_bytes=(1, 1)),
]


@pytest.mark.parametrize(("text", "mesh"), [("u2", (2, 1)), ("r4", (1, 4)), ("u2r2", (2, 2)), ("u10r3", (10, 3))])
def test_meshes_have_names(text, mesh):
    assert parse_mesh(text) == mesh and mesh_name(*mesh) == text


@pytest.mark.parametrize("text", ["", "2", "u", "u1", "u0r2", "u2u2", "x2", "u2r2x"])
def test_other_names_are_refused(text):
    with pytest.raises(SeqparError, match="mesh"):
        parse_mesh(text)


def test_ratios_are_of_the_same_round():
    found = bench_report.verdicts(TIMED)
    assert found["seqpar u2 / diffusers u2"] == Spread.of([5 / 6, 1.2, 0.75])
    assert found["best seqpar / best diffusers"] == Spread.of([4 / 6, 0.9, 0.6])
    assert set(found) == {"seqpar u2 / diffusers u2", "best seqpar / best diffusers"}
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0) and Spread.of([1.0, 2.0, 3.0]).median == 2.0


def test_the_report_has_every_program():
    text = bench_report.table("flux", Sizes(), TIMED)
    assert "cannot: RuntimeError: uneven" in text and "2.000 [1.833 .. 2.000]" in text  # 10/5, 20/12, 30/15
    rows = bench_report.to_dict("flux", Sizes(), TIMED)["programs"]
    assert [row["program"] for row in rows] == [t.program for t in TIMED] and "speed_up" not in rows[3]
    json.dumps(rows)


def test_the_order_rotates():
    orders = [bench.rotated(5, number) for number in range(10)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert sorted(order[0] for order in orders) == sorted([*range(5)] * 2)
    assert {(order[order.index(1) - 1]) for order in orders if order.index(1)} == {0, 2}


def test_wrong_options_are_told():
    for arguments in (["--mesh", "u2", "u4"], ["--rounds", "0"], ["--mesh", "q"], ["--heads", "0"]):
        with pytest.raises(SystemExit):
            bench.main(arguments)


def test_a_tiny_run(tmp_path, capsys):
    path = tmp_path / "bench.json"
    sizes = ["--heads", "2", "--head-dim", "16", "--blocks", "1", "--tokens", "64", "--text-tokens", "8"]
    assert bench.main(["--model", "wan", "--mesh", "u2", "r2", "--rounds", "2", *sizes, "--json", str(path)]) == 0
    assert "seqpar u2 / diffusers u2" in capsys.readouterr().out
    (found,) = json.loads(path.read_text())
    programs = found["programs"]
    assert [(p["program"], p["ulysses"], p["ring"]) for p in programs] == [(ONE, 1, 1), (PEER, 2, 1), (OURS, 2, 1), (PEER, 1, 2), (OURS, 1, 2)]
    for p in programs:
        assert p["refusal"] == "" and len(p["milliseconds"]) == 2 and min(p["milliseconds"]) > 0 and p["relative_error"] < 1e-5
        assert len(p["peak_bytes"]) == 2 and min(p["peak_bytes"]) > 0
    assert sum(programs[0]["bytes"].values()) == 0
    assert programs[2]["calls"]["all_to_all"] == 2 < programs[1]["calls"]["all_to_all"] and programs[4]["calls"]["ring"] == 1
