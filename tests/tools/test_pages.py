"""Finding and running the blocks of a page."""

import inspect

import pytest

from seqpar.tools.pages import blocks_of, run_blocks

PAGE = """# A page

```python
import os
def double(x):
    return 2 * x
```

```text
no = code
```

    ```python
    raise ValueError("indented")
    ```

```python
skipped = True
```

```python
two = double(1)
here = os.getcwd()
```
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_blocks_are_found_by_language(page):
    assert [len(blocks_of(page, language)) for language in ("python", "text", "py")] == [3, 1, 0] and blocks_of(page, "text") == ["no = code\n"]


def test_blocks_share_names_and_have_source_lines(page, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    names = run_blocks(page, folder, file="code.py", skip=lambda block: "skipped" in block)
    assert names["two"] == 2 and "skipped" not in names and names["here"] == str(folder)
    assert inspect.getsource(names["double"].__code__) == "def double(x):\n    return 2 * x\n" and (folder / "code.py").exists()


def test_an_error_says_where(page, tmp_path):
    page.write_text(PAGE.replace("double(1)", "double()"))
    with pytest.raises(TypeError) as caught:
        run_blocks(page, tmp_path)
    assert caught.value.__notes__ == ["in python block 3 of page.md"]
    lines = (tmp_path / "page.py").read_text().splitlines()
    assert lines[caught.traceback[-1].lineno] == "two = double()"


def test_a_page_without_blocks(page, tmp_path):
    page.write_text("# Nothing")
    with pytest.raises(ValueError, match="page.md has no block"):
        run_blocks(page, tmp_path)
