"""Every python block of docs/plans.md runs, one after the other in one process, and what the page says they print is what they print."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plans.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Source lines are looked up by file, so the blocks are written into one."""
    path = tmp_path_factory.mktemp("page") / "transformer.py"
    path.write_text("\n".join(blocks("python")))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": "page"})
    return out.getvalue().replace(f"{path.parent}/", "")


def test_there_are_blocks():
    assert len(blocks("python")) == PAGE.read_text().count("```python") >= 3


@pytest.mark.parametrize("number", range(len(blocks("text"))))
def test_they_print_what_the_page_says(printed, number):
    assert blocks("text")[number] in printed
