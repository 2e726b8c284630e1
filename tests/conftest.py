"""Shared fixtures. Threads are limited before torch starts: many small ranks share few cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def _load_rank_pool():
    # Test files are no package (the repository root is one already), so a helper beside them is loaded by path.
    spec = importlib.util.spec_from_file_location("rank_pool", Path(__file__).with_name("rank_pool.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ranks():
    """Four real gloo ranks: `ranks.run(function, *args, timeout=120)` -> the four results, `ranks.outcomes` -> results or errors."""
    pool = _load_rank_pool().RankPool(4)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def two_ranks():
    """Like `ranks`, for tests whose every rank is expensive."""
    pool = _load_rank_pool().RankPool(2)
    yield pool
    pool.stop()
