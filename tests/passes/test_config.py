"""Settings of what is written beside the work."""

import contextvars
from pathlib import Path

import pytest

import seqpar
from seqpar.passes.progress import Dump


def test_the_innermost_setting_counts_and_none_turns_it_off(monkeypatch):
    monkeypatch.delenv("SEQPAR_DUMP_DIR", raising=False)
    assert seqpar.config.dump_dir is None
    with seqpar.config(dump_dir="a"):
        assert seqpar.config.dump_dir == Path("a")
        with seqpar.config(dump_dir=None):
            assert seqpar.config.dump_dir is None
        assert contextvars.Context().run(lambda: seqpar.config.dump_dir) is None, "of this thread or task only"
    assert seqpar.config.dump_dir is None


def test_the_environment_counts_where_nothing_is_set(monkeypatch):
    monkeypatch.setenv("SEQPAR_DUMP_DIR", "from/environment")
    assert seqpar.config.dump_dir == Path("from/environment")
    with seqpar.config(dump_dir=None):
        assert seqpar.config.dump_dir is None


def test_assigned_for_the_process_and_beside_blocks(monkeypatch):
    monkeypatch.setenv("SEQPAR_DUMP_DIR", "from/environment")
    try:
        seqpar.config.dump_dir = "assigned"
        assert seqpar.config.dump_dir == Path("assigned") == contextvars.Context().run(lambda: seqpar.config.dump_dir), "for other threads too"
        with seqpar.config(dump_dir="block"):
            assert seqpar.config.dump_dir == Path("block")
            seqpar.config.dump_dir = Path("rest")
            assert seqpar.config.dump_dir == Path("rest"), "the rest of the block"
        assert seqpar.config.dump_dir == Path("assigned")
        seqpar.config.dump_dir = None
        assert seqpar.config.dump_dir is None
    finally:
        del seqpar.config.dump_dir
    assert seqpar.config.dump_dir == Path("from/environment")


def test_it_dumps_where_it_was_assigned(tmp_path):
    try:
        seqpar.config.dump_dir = tmp_path / "new"
        assert Dump.open("program").folder.parent == tmp_path / "new"
    finally:
        del seqpar.config.dump_dir


def test_a_setting_that_does_not_exist_is_an_error():
    with pytest.raises(AttributeError):
        seqpar.config.dumpdir = "dump"


def test_settings_are_independent(monkeypatch):
    monkeypatch.setenv("SEQPAR_CACHE_DIR", "programs")
    monkeypatch.delenv("SEQPAR_DUMP_DIR", raising=False)
    with seqpar.config(dump_dir="a"):
        assert (seqpar.config.dump_dir, seqpar.config.cache_dir) == (Path("a"), Path("programs"))
        with seqpar.config(cache_dir=None):
            assert (seqpar.config.dump_dir, seqpar.config.cache_dir) == (Path("a"), None)
