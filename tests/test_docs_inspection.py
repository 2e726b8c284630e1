"""The code of docs/inspection.md runs as it is, one block after the other."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "inspection.md"


def test_blocks_run(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == PAGE.read_text().count("```python") == 5
    namespace = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "blocks.0-1 x 2" in printed and "forced to be whole" in printed and "recommended" in printed and "ulysses 4 x ring 1" in printed
