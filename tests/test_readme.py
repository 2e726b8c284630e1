"""Every python block of the README runs, on four real ranks, one after the other as a reader would type them."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from seqpar.compat import lookup_backend
from seqpar.tools.pages import blocks_of, run_blocks

README = Path(__file__).resolve().parents[1] / "README.md"


def run_readme(folder):
    rank = dist.get_rank()

    def skip(block):
        dist.barrier()  # the first rank may have been longer in a block of its own than ranks wait for each other
        return "seqpar.verify(" in block and rank > 0  # "without any launcher": one process

    # Four ranks that run a C++ compiler take minutes; what Inductor makes of a program is compared in test_backend.py.
    with mock.patch("seqpar.backend.lookup_backend", lambda _: lookup_backend("aot_eager")):
        return sorted(run_blocks(README, folder, file=f"rank{rank}.py", skip=skip))


@pytest.mark.timeout(900)
def test_blocks_run(ranks, tmp_path):
    assert len(blocks_of(README)) == README.read_text().count("```python") > 0
    names = ranks.run(run_readme, tmp_path, timeout=840)
    assert {"fast", "plan", "report"} <= set(names[0])
    assert all("fast" in names_of_rank for names_of_rank in names)


def test_it_names_commands_that_exist():
    text, makefile = README.read_text(), (README.parent / "Makefile").read_text()
    targets = re.findall(r"^    make (\w+)", text, re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (README.parent / link).exists(), link
