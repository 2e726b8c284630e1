"""Dispatch by kind of group; real process groups are tested in test_real_ranks.py."""

import pytest
import torch

from seqpar.runtime.counting import CountingGroup
from seqpar.runtime.groups import all_reduce, rank_of, size_of, start_all_gather, start_ring_exchange, wait


def test_objects_are_groups():
    group = CountingGroup(4, 2)
    assert (size_of(group), rank_of(group)) == (4, 2)
    assert wait(start_all_gather(torch.ones(2, 3, device="meta"), group)).shape == (8, 3)
    assert wait(start_ring_exchange(torch.ones(5, device="meta"), 7, group)).shape == (7,)
    assert all_reduce(torch.ones(2, dtype=torch.complex64), "avg", group).dtype == torch.complex64


def test_unknown_reductions_are_refused():
    with pytest.raises(AssertionError, match="median"):
        all_reduce(torch.ones(1), "median", CountingGroup(2, 0))
    with pytest.raises(AssertionError, match="complex64"):
        all_reduce(torch.ones(1, dtype=torch.complex64), "max", CountingGroup(2, 0))
