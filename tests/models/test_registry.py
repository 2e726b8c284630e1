"""Families by name."""

import pytest

from seqpar.errors import SeqparError
from seqpar.models import registry


def test_every_name_is_found_under_that_name():
    assert len(registry.names()) >= 13
    for name in registry.names():
        assert registry.get(name).name == name


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(SeqparError, match="no model family 'fluxx'.*flux, qwen-image"):
        registry.get("fluxx")
