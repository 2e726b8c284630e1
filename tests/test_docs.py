"""Every python block of every page in docs/ runs, from the top of the page to its end, as a reader would paste them.

Pages that compile for several ranks run on two real ones. Blocks that serve one process ("without any launcher") run on the first only.
A block marked `py` needs what only the reader has.
"""

import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist

DOCS = Path(__file__).resolve().parents[1] / "docs"
MULTI = re.compile(r"sp_compile\(.*ulysses=\d|seqpar\.load\(")
ALONE = ("seqpar.verify(", "seqpar.plan(", "seqpar.suggest(")
ELSEWHERE = {"pipelines.md": "test_pipelines.py", "plans.md": "test_plans_page.py"}  # which also look at what is printed


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


PAGES = sorted(page for page in DOCS.glob("*.md") if blocks_of(page) and page.name not in {"inspection.md", *ELSEWHERE})
ON_RANKS = [page for page in PAGES if any(map(MULTI.search, blocks_of(page)))]


def run_blocks(name, blocks, folder):
    os.chdir(folder)
    namespace = {"__name__": "docs"}
    first = not dist.is_initialized() or dist.get_rank() == 0
    for number, block in enumerate(blocks, 1):
        if first or not any(word in block for word in ALONE):
            exec(compile(block, f"{name}, python block {number}", "exec"), namespace)
    return len(namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ON_RANKS], ids=lambda page: page.stem)
def test_blocks_run_in_one_process(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(page.name, blocks_of(page), tmp_path) > 1


@pytest.mark.parametrize("page", ON_RANKS, ids=lambda page: page.stem)
def test_blocks_run_on_two_ranks(two_ranks, page, tmp_path):
    assert min(two_ranks.run(run_blocks, page.name, blocks_of(page), tmp_path)) > 1


def test_inspection_prints_what_it_shows(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "inspection.md"
    blocks = blocks_of(page)
    assert len(blocks) == page.read_text().count("```python") == 5
    run_blocks(page.name, blocks, tmp_path)
    printed = capsys.readouterr().out
    assert "blocks.0-1 x 2" in printed and "forced to be whole" in printed and "recommended" in printed and "ulysses 4 x ring 1" in printed


def test_links_lead_somewhere():
    for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_site_has_every_page():
    text = (DOCS.parent / "mkdocs.yml").read_text()
    assert {page.name for page in DOCS.glob("*.md")} == set(re.findall(r": (\w+\.md)$", text, re.MULTILINE))


def test_pages_that_run_elsewhere_do():
    for page, test in ELSEWHERE.items():
        assert blocks_of(DOCS / page) and page in Path(__file__).with_name(test).read_text()
