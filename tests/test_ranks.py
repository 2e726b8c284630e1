"""The process pool that tests run real collectives on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from seqpar.errors import MeshError


def total_of(x):
    x = x + dist.get_rank()
    dist.all_reduce(x)
    return dist.get_rank(), x


def raise_everywhere(message):
    raise MeshError(message)


def raise_on_rank_1_while_others_wait():
    if dist.get_rank() == 1:
        raise MeshError("only here")
    dist.barrier()


def hang():
    time.sleep(60)


def die():
    os._exit(3)


def test_results_come_in_rank_order(ranks):
    results = ranks.run(total_of, torch.zeros(3))
    assert [rank for rank, _ in results] == [0, 1, 2, 3]
    assert all(torch.equal(total, torch.full((3,), 6.0)) for _, total in results)


def test_functions_of_modules_can_be_sent(ranks):
    assert ranks.run(os.path.join, "a", "b") == ["a/b"] * 4


def test_exceptions_keep_their_type_and_say_where(ranks):
    with pytest.raises(MeshError, match="too few") as caught:
        ranks.run(raise_everywhere, "too few")
    assert "raise_everywhere" in caught.value.__notes__[0]
    assert all(isinstance(outcome, MeshError) for outcome in ranks.outcomes(raise_everywhere, "x"))


def test_a_rank_that_fails_alone_is_no_hang(ranks):
    start = time.monotonic()
    with pytest.raises(MeshError, match="only here"):
        ranks.run(raise_on_rank_1_while_others_wait)
    assert time.monotonic() - start < 30
    assert len(ranks.run(total_of, torch.zeros(1))) == 4


def test_timeout_and_death_are_errors_and_the_pool_recovers(ranks):
    with pytest.raises(TimeoutError, match=r"\[0, 1, 2, 3\]"):
        ranks.run(hang, timeout=1)
    with pytest.raises(TimeoutError, match="died"):
        ranks.run(die)
    assert len(ranks.run(total_of, torch.zeros(1))) == 4


def test_local_functions_are_refused(ranks):
    with pytest.raises(TypeError, match="module-level"):
        ranks.run(lambda: None)
