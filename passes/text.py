"""Numbers and tables as text for people: the one place where reports are formatted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

MAX_LINES = 12


def amount(value: float) -> str:
    """12.3 M, 4.56 G, …"""
    if math.isinf(value):
        return "∞ "
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} P"


def duration(seconds: float) -> str:
    """34.2 ms, 1.5 s, …"""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"


def percent(part: float, whole: float) -> str:
    """`+1.2 %`: how much `part` exceeds or falls short of nothing, as a share of `whole`."""
    value = 100 * part / whole if whole else 0.0
    return f"{value:+.0f} %" if abs(value) >= 10 else f"{value:+.2g} %"


def short(source: str) -> str:
    """`…/site-packages/package/x.py:12` -> `package/x.py:12`; a user's own file keeps its path."""
    return source.rpartition("site-packages/")[2]


def capped(rows: Iterable[str], limit: int = MAX_LINES) -> list[str]:
    """The rows, or the first of them and how many more there are."""
    rows = list(rows)
    return rows if len(rows) <= limit else [*rows[: limit - 1], f"  … {len(rows) - limit + 1} more"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], indent: str = "  ", left: int = 1) -> list[str]:
    """Lines of a table: the first `left` columns and the last one flush left, others flush right; two spaces between columns."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    last = len(header) - 1
    return [
        (indent + "  ".join(cell if i == last else cell.ljust(widths[i]) if i < left else cell.rjust(widths[i]) for i, cell in enumerate(line))).rstrip()
        for line in lines
    ]
