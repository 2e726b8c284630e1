"""Every python block of the README runs, on four real ranks, one after the other as a reader would type them."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from seqpar.compat import lookup_backend

README = Path(__file__).resolve().parents[1] / "README.md"


def python_blocks():
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def run_blocks(blocks):
    namespace = {"__name__": "readme"}
    # Four ranks that run a C++ compiler take minutes; what Inductor makes of a program is compared in test_backend.py.
    with mock.patch("seqpar.backend.lookup_backend", lambda _: lookup_backend("aot_eager")):
        for number, block in enumerate(blocks, 1):
            if "seqpar.verify(" in block and dist.get_rank() > 0:
                continue  # "without any launcher": one process
            exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    return sorted(namespace)


@pytest.mark.timeout(900)
def test_blocks_run(ranks):
    blocks = python_blocks()
    assert len(blocks) == README.read_text().count("```python") > 0
    names = ranks.run(run_blocks, blocks, timeout=840)
    assert {"fast", "plan", "report"} <= set(names[0])
    assert all("fast" in names_of_rank for names_of_rank in names)


def test_it_names_commands_that_exist():
    text, makefile = README.read_text(), (README.parent / "Makefile").read_text()
    targets = re.findall(r"^    make (\w+)", text, re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (README.parent / link).exists(), link
