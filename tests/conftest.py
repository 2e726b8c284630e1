"""Shared fixtures. Threads are limited before torch starts: many small ranks share few cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util  # noqa: E402
import logging  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from seqpar import logs  # noqa: E402

torch.set_num_threads(1)
# pytest listens to every logger that does not propagate; to this one torch writes graphs and stacks as soon as somebody listens.
logging.getLogger("torch.__trace").propagate = True


def _load(name):
    # Test files are no package (the repository root is one already), so a helper beside them is loaded by path.
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


POOLS = {"ranks", "two_ranks"}  # fixtures that start processes
LAUNCHES = "launches"  # marks a file or a test that starts ranks by itself


def pytest_configure(config):
    config.addinivalue_line("markers", f"{LAUNCHES}: starts several processes by itself; runs in the same worker as the pools of ranks")


def pytest_report_header():
    return f"torch {torch.__version__}"


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(config, items):
    if config.pluginmanager.hasplugin("xdist"):
        groups = {item: group_of(item) for item in items}
        for item, group in groups.items():
            item.add_marker(pytest.mark.xdist_group(group))
        items.sort(key=lambda item: groups[item] != "processes")  # the longest group starts first


def pytest_collection_finish(session):
    # pytest 9.2 and pytest-xdist 3.8 together lose the groups without a word, and every worker then makes all fixtures and pools.
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("pytest-xdist does not know the groups of the tests: install pytest < 9.2 (see pyproject.toml)")


def group_of(item):
    """Tests of one group run in one worker, so that they share fixtures and caches.

    All that start ranks are one group: there is one pool of each size, and not more processes than needed at a time. Else a file is a group,
    or, where it names parameters in `GROUP_BY`, all its tests with the same values of these.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if POOLS & (set(item.fixturenames) - set(parameters)) or item.get_closest_marker(LAUNCHES):
        return "processes"
    shared = [f"{name}={parameters[name]}" for name in getattr(item.module, "GROUP_BY", ()) if name in parameters]
    return " ".join([str(item.path.relative_to(item.config.rootpath)), *shared])


@pytest.fixture(autouse=True)
def log_levels_put_back():
    """No test sees the levels and handlers that another one left: a compilation sets them for the process (SEQPAR_LOGS, a terminal)."""
    loggers = [logging.getLogger(name) for name in ("seqpar", *(f"seqpar.{name}" for name in logs.NAMES))]
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
    yield
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture(scope="session")
def ranks():
    """Four real gloo ranks: `ranks.run(function, *args, timeout=300)` -> the four results, `ranks.outcomes` -> results or errors."""
    pool = _load("rank_pool").RankPool(4)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def two_ranks():
    """Like `ranks`, for tests whose every rank is expensive. Both pools are in the same worker, and an idle one costs nothing."""
    pool = _load("rank_pool").RankPool(2)
    yield pool
    pool.stop()


@pytest.fixture
def both(monkeypatch):
    """Traces a model with and without copies of alike blocks, and compares: `trace_twice.py`."""
    return _load("trace_twice").Both(monkeypatch)
