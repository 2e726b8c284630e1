"""Settings of what is written beside the work."""

import contextvars
from pathlib import Path

import seqpar


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


def test_settings_are_independent(monkeypatch):
    monkeypatch.setenv("SEQPAR_CACHE_DIR", "programs")
    monkeypatch.delenv("SEQPAR_DUMP_DIR", raising=False)
    with seqpar.config(dump_dir="a"):
        assert (seqpar.config.dump_dir, seqpar.config.cache_dir) == (Path("a"), Path("programs"))
        with seqpar.config(cache_dir=None):
            assert (seqpar.config.dump_dir, seqpar.config.cache_dir) == (Path("a"), None)
