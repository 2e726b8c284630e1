"""What ranks do: the order of a round, jobs that make no sense, messages in a row of a table."""

import pytest

from seqpar.errors import SeqparError
from seqpar.tools.bench.contenders import PEERS
from seqpar.tools.bench.measure import Job, rotated, shortened
from seqpar.tools.sized_models import Sizes


def test_the_order_rotates():
    orders = [rotated(5, number) for number in range(10)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert sorted(order[0] for order in orders) == sorted([*range(5)] * 2)
    assert {(order[order.index(1) - 1]) for order in orders if order.index(1)} == {0, 2}


def job(**changes):
    return Job(**{"models": ("wan",), "sizes": (Sizes(),), "meshes": ((2, 1), (1, 2)), **changes})


@pytest.mark.parametrize("changes", [{"meshes": ((2, 1), (4, 1))}, {"meshes": ((1, 1),)}, {"rounds": 0}, {"threads": 0}])
def test_impossible_jobs_are_refused(changes):
    with pytest.raises(SeqparError, match="at least|>= 1"):
        job(**changes)


def test_a_peer_runs_on_the_meshes_it_knows():
    rows = [(c.name, u, r) for c, u, r in job(peers=tuple(peer.option for peer in PEERS)).contenders()]
    assert rows[0] == ("one process", 1, 1) and [row[1:] for row in rows if row[0] == "seqpar"] == [(2, 1), (1, 2)]
    assert [row[1:] for row in rows if row[0] == "torch"] == [(1, 2)] and [row[1:] for row in rows if row[0] == "diffusers anything"] == [(2, 1)]
    assert len(rows) == len(set(rows)) == 1 + 2 + 2 + 1 + 1 + 1 + 2


def test_on_a_slow_link_seqpar_is_told_the_rates_as_well():
    rows = [(c.name, u, r) for c, u, r in job(slow_link=(1e9, 5e-5)).contenders()]
    assert rows[-2:] == [("seqpar", 1, 2), ("seqpar rates", 1, 2)] and ("seqpar rates", 2, 1) in rows


def test_messages_are_cut_to_a_row():
    assert shortened("no kernel. Available: [...]\nmore") == "no kernel" and shortened("") == ""
    assert len(shortened("x" * 1000)) == 200

