"""Heads that the ranks do not divide, shared by rows: who has what, and when."""

import pytest

from seqpar.partitioner.head_shares import Piece, plan_of_shares, share_heads


def test_six_heads_on_four_ranks():
    halves = [(p.start, p.stop, p.first, p.last) for pieces in share_heads(6, 4) for p in pieces]
    assert halves == [(0, 1, 0, 4), (1, 2, 0, 2), (1, 2, 2, 4), (2, 3, 0, 4), (3, 4, 0, 4), (4, 5, 0, 2), (4, 5, 2, 4), (5, 6, 0, 4)]
    assert plan_of_shares(share_heads(6, 4)).keys == ((0, 2), (1, 3), (3, 5), (4, 6))
    assert Piece(1, 2, 2, 4, 4).rows(13) == (6, 13)


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("heads", range(1, 14))
def test_every_row_of_every_head_once_and_evenly(heads, ranks):
    shares = share_heads(heads, ranks)
    rows = [(h, part) for pieces in shares for p in pieces for h in range(p.start, p.stop) for part in range(p.first, p.last)]
    assert rows == [(h, part) for h in range(heads) for part in range(ranks)]
    assert {sum((p.stop - p.start) * (p.last - p.first) for p in pieces) for pieces in shares} == {heads}
