"""Switches for what is logged."""

import logging
import subprocess
import sys

import pytest
import torch

import seqpar
from seqpar import logs
from seqpar.errors import SeqparError


def level(name):
    return logging.getLogger(f"seqpar.{name}").level


def test_switches():
    assert logs.parse("trace, +solve,-emit") == {"trace": logging.INFO, "solve": logging.DEBUG, "emit": logging.ERROR}
    assert logs.parse("+all,-trace") == dict.fromkeys(logs.NAMES, logging.DEBUG) | {"trace": logging.ERROR}
    assert logs.parse("off") == dict.fromkeys(logs.NAMES, logging.CRITICAL)
    with pytest.raises(SeqparError, match="SEQPAR_LOGS names 'solver'; it knows trace, infer, solve"):
        logs.parse("solver")


def test_levels_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("SEQPAR_LOGS", "trace,+solve")
    logs.configure()
    assert (level("trace"), level("solve"), level("emit")) == (logging.INFO, logging.DEBUG, logging.NOTSET)


@pytest.mark.parametrize(("terminal", "rank", "expected"), [(True, "0", logging.INFO), (True, "1", logging.NOTSET), (False, "0", logging.NOTSET)])
def test_without_switches_stages_are_shown_on_a_terminal_by_the_first_rank(monkeypatch, terminal, rank, expected):
    monkeypatch.delenv("SEQPAR_LOGS", raising=False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    logs.configure()
    assert {level(name) for name in logs.NAMES} == {expected}


def test_levels_the_user_chose_stay(monkeypatch):
    monkeypatch.delenv("SEQPAR_LOGS", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("RANK", raising=False)
    logging.getLogger("seqpar.trace").setLevel(logging.WARNING)
    logs.configure()
    assert level("trace") == logging.WARNING and level("solve") == logging.INFO


def test_a_handler_is_added_only_where_nobody_has_one(monkeypatch):
    monkeypatch.setenv("SEQPAR_LOGS", "all")
    monkeypatch.setenv("RANK", "2")
    top = logging.getLogger("seqpar")
    logs.configure()
    assert not top.handlers, "pytest's handlers get the records"
    top.propagate = False
    logs.configure()
    logs.configure()
    (handler,) = top.handlers
    record = logging.LogRecord("seqpar.trace", logging.INFO, "", 0, "tracing %s", ("Net",), None)
    assert handler.format(record) == "[seqpar.trace rank 2] tracing Net"


@pytest.mark.parametrize("function", [seqpar.sp_compile, seqpar.plan, seqpar.verify, seqpar.derive_sp_plan, lambda model, inputs: seqpar.suggest(model, inputs, 2)])
def test_whatever_compiles_reads_the_switches(function, monkeypatch):
    monkeypatch.setenv("SEQPAR_LOGS", "solver")
    with pytest.raises(SeqparError, match="SEQPAR_LOGS names 'solver'"):
        function(torch.nn.Linear(2, 2), (torch.ones(1, 2),))


def test_importing_has_no_side_effect():
    program = "import logging, seqpar, seqpar.compile; top = logging.getLogger('seqpar'); assert not top.handlers and logging.getLogger('seqpar.trace').level == 0"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env={**__import__("os").environ, "SEQPAR_LOGS": "all"})
