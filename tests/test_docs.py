"""Every python block of every page in docs/ runs, from the top of the page to its end, as a reader would paste them.

Pages that compile for several ranks run on two real ones. Blocks that serve one process ("without any launcher") run on the first only.
A block marked `py` needs what only the reader has.
"""

import inspect
import pydoc
import re
from pathlib import Path

import pytest
import torch.distributed as dist

from seqpar.tools.pages import blocks_of, run_blocks

DOCS = Path(__file__).resolve().parents[1] / "docs"
MULTI = re.compile(r"sp_compile\(.*ulysses=\d|seqpar\.load\(")
ALONE = ("seqpar.verify(", "seqpar.plan(", "seqpar.suggest(")
ELSEWHERE = {"pipelines.md": "test_pipelines.py", "plans.md": "test_plans_page.py"}  # which also look at what is printed


PAGES = sorted(page for page in DOCS.glob("*.md") if blocks_of(page) and page.name not in {"inspection.md", *ELSEWHERE})
ON_RANKS = [page for page in PAGES if any(map(MULTI.search, blocks_of(page)))]


def run_page(page, folder):
    """How many names the page defines. The ranks share a folder, each has its own file of the blocks."""
    rank = dist.get_rank() if dist.is_initialized() else 0

    def skip(block):
        if dist.is_initialized():
            dist.barrier()  # the first rank may have been longer in a block of its own than ranks wait for each other
        return rank > 0 and any(word in block for word in ALONE)

    return len(run_blocks(page, folder, file=f"rank{rank}.py", skip=skip))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ON_RANKS], ids=lambda page: page.stem)
def test_blocks_run_in_one_process(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page(page, tmp_path) > 1


@pytest.mark.parametrize("page", ON_RANKS, ids=lambda page: page.stem)
def test_blocks_run_on_two_ranks(two_ranks, page, tmp_path):
    assert min(two_ranks.run(run_page, page, tmp_path)) > 1


def test_inspection_prints_what_it_shows(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "inspection.md"
    assert len(blocks_of(page)) == page.read_text().count("```python") == 5
    run_page(page, tmp_path)
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


def functions_of(found):
    """The documented object itself, or the public functions of a class, a module or an object's class."""
    if inspect.isfunction(found):
        return [found]
    holder = found if inspect.isclass(found) or inspect.ismodule(found) else type(found)
    return [member for name, member in vars(holder).items() if inspect.isfunction(member) and not name.startswith("_")]


def test_docstrings_name_parameters_that_exist():
    """The site's generator is strict: it stops at an entry under "Args:" that is no parameter."""
    seen = 0
    for name in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE):
        for function in functions_of(pydoc.locate(name)):
            entries = re.search(r"^Args:\n((?:    .*\n?)+)", inspect.getdoc(function) or "", re.MULTILINE)
            for entry in re.findall(r"^    (\S.*?):", entries[1], re.MULTILINE) if entries else ():
                assert entry in inspect.signature(function).parameters, f"{name}: {function.__name__} has no parameter {entry!r}"
                seen += 1
    assert seen > 20


def test_pages_that_run_elsewhere_do():
    for page, test in ELSEWHERE.items():
        assert blocks_of(DOCS / page) and page in Path(__file__).with_name(test).read_text()


def test_the_site_finds_the_package_in_a_folder_of_any_name():
    """The API pages are made from source; an editable install of a folder that is not called like the package is not found."""
    text = (DOCS.parent / "mkdocs.yml").read_text()
    (folder,) = re.findall(r"paths: \[([^]]+)\]", text)
    assert (DOCS.parent / folder / "seqpar").resolve() == DOCS.parent.resolve()
