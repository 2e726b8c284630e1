"""Figures of one program: spreads, names of meshes, ratios of the same round."""

import pytest

from seqpar.errors import SeqparError
from seqpar.tools.bench.timed import Spread, Timed, best, mesh_name, parse_mesh, verdicts

TIMED = (
    Timed("one process", 1, 1, (10.0, 20.0, 30.0), peak_bytes=(1,)),
    Timed("diffusers", 2, 1, (6.0, 10.0, 20.0), peak_bytes=(1, 1)),
    Timed("seqpar", 2, 1, (5.0, 12.0, 15.0), peak_bytes=(1, 1)),
    Timed("diffusers", 1, 2, refusal="RuntimeError: uneven"),
    Timed("torch", 1, 2, (8.0, 9.0, 16.0), peak_bytes=(1, 1)),
    Timed("seqpar", 1, 2, (4.0, 9.0, 12.0), peak_bytes=(1, 1)),
)


@pytest.mark.parametrize(("text", "mesh"), [("u2", (2, 1)), ("r4", (1, 4)), ("u2r2", (2, 2)), ("u10r3", (10, 3))])
def test_meshes_have_names(text, mesh):
    assert parse_mesh(text) == mesh and mesh_name(*mesh) == text


@pytest.mark.parametrize("text", ["", "2", "u", "u1", "u0r2", "u2u2", "x2", "u2r2x"])
def test_other_names_are_refused(text):
    with pytest.raises(SeqparError, match="mesh"):
        parse_mesh(text)


def test_ratios_are_of_the_same_round():
    found = verdicts(TIMED)
    assert found["seqpar u2 / diffusers u2"] == Spread.of([5 / 6, 1.2, 0.75])
    assert found["seqpar r2 / torch r2"] == Spread.of([0.5, 1.0, 0.75])
    assert found["best seqpar (seqpar r2) / best peer (torch r2)"] == found["seqpar r2 / torch r2"]  # by the median: 9 against 10
    assert len(found) == 3
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0) and Spread.of([1.0, 2.0, 3.0]).median == 2.0


def test_the_best_has_the_least_median():
    assert best(TIMED[1:]).name == "torch r2" and best(TIMED[3:4]) is None
