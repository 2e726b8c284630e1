"""Every python block of docs/plans.md runs, one after the other in one process, and what the page says they print is what they print."""

import contextlib
import io
import os
from pathlib import Path

import pytest

from seqpar.tools.pages import blocks_of, run_blocks

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plans.md"
SHOWN = blocks_of(PAGE, "text")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("page"), os.getcwd()
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            run_blocks(PAGE, folder, file="transformer.py")
    finally:
        os.chdir(before)
    return out.getvalue().replace(f"{folder}/", "")


def test_there_are_blocks():
    assert len(blocks_of(PAGE)) == PAGE.read_text().count("```python") >= 3


@pytest.mark.parametrize("number", range(len(SHOWN)))
def test_they_print_what_the_page_says(printed, number):
    assert SHOWN[number] in printed
