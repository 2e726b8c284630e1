"""The page of figures."""

import json
from pathlib import Path

import pytest

from seqpar.partitioner.machines import MACHINES
from seqpar.tools.bench import host, page, report
from seqpar.tools.bench.emulated import Emulated, RankTimes
from seqpar.tools.bench.report import Run
from seqpar.tools.bench.timed import Timed
from seqpar.tools.sized_models import Sizes

pytest.importorskip("matplotlib")


def document():
    programs = (Timed("one process", 1, 1, (10.0, 20.0), peak_bytes=(1,)), Timed("seqpar", 2, 1, (5.0, 12.0), peak_bytes=(1, 1)))
    runs = [report.to_dict(Run("flux", Sizes(tokens=tokens), programs)) for tokens in (64, 128)]
    return {"host": host.describe(["--tokens", "64", "128"]), "runs": runs}


def emulation():
    times = RankTimes((10.0, 12.0), (1.0, 1.0), 5)
    return {"host": host.describe([]), "emulated": [Emulated.of(times, [times], MACHINES["H100"], 1.0).to_dict()]}


def test_the_page_of_the_documentation_is_of_this_version():
    text = (Path(page.__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert text.startswith(page.HEAD.rstrip()) and page.contenders() in text, "python -m seqpar.tools.bench --read FILE … --write docs/benchmarks.md"


def test_a_page_without_figures_says_so(tmp_path):
    assert page.write(tmp_path / "b.md", []) == [tmp_path / "b.md"]
    text = (tmp_path / "b.md").read_text()
    assert "None have been recorded yet" in text and "`diffusers-anything`" in text and "What is predicted" in text


def test_a_page_has_tables_and_plots_of_every_job(tmp_path):
    documents = json.loads(json.dumps([document(), emulation()]))
    written = page.write(tmp_path / "b.md", documents)
    assert [path.name for path in written] == ["b.md", "b-times-1.svg", "b-scaling-1.svg"]
    text = (tmp_path / "b.md").read_text()
    assert "## Measured: flux, 64 and 128 tokens\n" in text and text.count("](b-") == 2 and "python -m seqpar.tools.bench --tokens 64 128" in text and "Predicted: collectives (of H100, NVLink" in text
    assert "None have been recorded" not in text and "## Published by others" in text
    page.write(tmp_path / "b.md", [])
    assert [path.name for path in tmp_path.iterdir()] == ["b.md"]  # nothing stays of an earlier page
