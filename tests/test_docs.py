"""Every python block of these pages runs, one after the other as a reader would type them."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def run_blocks(page, folder):
    import os

    before = os.getcwd()
    os.chdir(folder)
    try:
        namespace = {"__name__": page}
        blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
        for number, block in enumerate(blocks, 1):
            exec(compile(block, f"{page}, python block {number}", "exec"), namespace)
        return sorted(namespace)
    finally:
        os.chdir(before)


def test_saving(two_ranks, tmp_path):
    for names in two_ranks.run(run_blocks, "saving.md", str(tmp_path)):
        assert {"fast", "out"} <= set(names)
    assert (tmp_path / "block.seqpar").stat().st_size > 1000


def test_pictures(tmp_path):
    assert "plan" in run_blocks("pictures.md", tmp_path)
    assert "ring_attention" in (tmp_path / "plan.html").read_text() and "digraph" in (tmp_path / "plan.dot").read_text()
