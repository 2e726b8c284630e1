"""The blocks of code of a Markdown page: found, and run one after the other, as a reader would paste them."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def blocks_of(page: Path, language: str = "python") -> list[str]:
    """The fenced blocks in a language, from the top of the page to its end; indented ones are no blocks."""
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_blocks(page: Path, folder: Path, file: str = "", skip: Callable[[str], bool] | None = None) -> dict[str, Any]:
    """Run the python blocks of a page in one namespace, with `folder` as the working directory; returns the namespace.

    The blocks are one file of their own in `folder`, as seqpar and Python look source lines up there. file: its name; by default the page's.
    skip: blocks for which it is true do not run.

    Raises:
        ValueError: the page has no python block.
        Exception: what a block raises, with the page's name and the block's number as a note.
    """
    blocks = blocks_of(page)
    if not blocks:
        raise ValueError(f"{page} has no block that begins with ```python")
    path = folder / (file or f"{page.stem}.py")
    path.write_text("\n".join(blocks), encoding="utf-8")
    os.chdir(folder)
    namespace: dict[str, Any] = {"__name__": page.stem}
    before = 0
    for number, block in enumerate(blocks, 1):
        if skip is None or not skip(block):
            try:
                exec(compile("\n" * before + block, str(path), "exec"), namespace)
            except Exception as error:
                error.add_note(f"in python block {number} of {page.name}")
                raise
        before += block.count("\n") + 1
    return namespace
