"""Who says how much while the benchmark runs."""

import logging
import sys

import pytest

from seqpar.tools.bench.progress import log, show


@pytest.fixture(autouse=True)
def put_back():
    before = log.level, list(log.handlers), log.propagate
    yield
    log.setLevel(before[0])
    log.handlers[:], log.propagate = before[1:]


@pytest.mark.parametrize(
    ("rank", "terminal", "said"),
    [(0, True, "flux\n  seqpar u2\n"), (0, False, "flux\n"), (1, True, ""), (1, False, "")],
)
def test_the_first_rank_speaks_and_details_are_for_terminals(rank, terminal, said, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    top = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger("seqpar"), "handlers", [top])
    for _ in range(2):  # shown twice, said once
        show(rank)
    log.info("flux")
    log.debug("  seqpar u2")
    found = capsys.readouterr()
    assert found.err == said and found.out == ""
