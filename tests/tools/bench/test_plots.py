"""Plots: what is in them, and that the same figures give the same file."""

import dataclasses
from xml.etree import ElementTree

import pytest

from seqpar.tools.bench import plots
from seqpar.tools.bench.report import Run
from seqpar.tools.bench.timed import Timed
from seqpar.tools.sized_models import Sizes

pytest.importorskip("matplotlib")


def run(tokens, link=""):
    programs = (
        Timed("one process", 1, 1, (10.0, 20.0, 30.0), peak_bytes=(1,)),
        Timed("torch", 1, 2, (5.0, 12.0, 15.0), peak_bytes=(1, 1)),
        Timed("seqpar", 1, 2, (5.0, 10.0, 15.0 * 1024 / tokens), peak_bytes=(1, 1)),
        Timed("diffusers", 1, 2, refusal="no"),
    )
    return Run("flux", Sizes(tokens=tokens), programs, link=link)


def words(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.text and element.text.strip()]


def test_step_times_have_a_bar_per_program_that_ran():
    found = words(plots.step_times([run(1024), run(2048)]))
    assert {"one process", "torch r2", "seqpar r2", "flux, 1,024 tokens", "flux, 2,048 tokens"} <= set(found) and "diffusers r2" not in found


def test_scaling_joins_runs_that_differ_in_tokens():
    runs = [run(2048), run(1024), run(1024, "on a link of 1Gbit")]
    series = plots.scaled(runs)
    assert set(series) == {"flux"}  # one point is no curve
    assert [(n, s.median) for n, s in series["flux"]["seqpar", "seqpar r2"]] == [(1024, 2.0), (2048, 2.0)]
    first = plots.scaling(runs)
    assert first == plots.scaling(runs) and {"1,024", "2,048", "seqpar r2"} <= set(words(first))


def test_programs_keep_their_colours():
    assert plots.colours([run(1024)])["torch"] == plots.colours([dataclasses.replace(run(1024), programs=run(1024).programs[1:])])["torch"]
