"""Figures of others."""

from seqpar.tools.bench.published import ROWS, markdown
from seqpar.tools.bench.timed import mesh_name, parse_mesh


def test_every_figure_has_a_mesh_and_a_source():
    for row in ROWS:
        assert row.source and row.case and all(mesh_name(*parse_mesh(mesh)) == mesh and 0 < value < 10 for mesh, value in row.speed_ups)
    assert len({(row.source, row.case) for row in ROWS}) == len(ROWS)


def test_the_section_says_whose_they_are():
    text = markdown()
    assert "none was reproduced here" in text and text.count("\n| ") == len(ROWS) + 1 and "u2 1.73, u4 2.84, u8 3.65" in text
