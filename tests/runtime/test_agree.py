import time

import pytest
import torch.distributed as dist

from seqpar.errors import DisagreementError
from seqpar.runtime.agree import check_agreement, everybody_says
from seqpar.runtime.mesh import build_mesh


def compare(fingerprints, silent=(), ulysses=2, ring=2, timeout_s=10):
    """Seconds it took."""
    mesh = build_mesh(ulysses, ring)
    start = time.monotonic()
    if dist.get_rank() not in silent:
        check_agreement(fingerprints[dist.get_rank()], mesh, timeout_s)
    return time.monotonic() - start


def test_a_single_rank_agrees_with_itself():
    check_agreement("anything", build_mesh(1, 1))


def test_agreement_again_and_again(ranks):
    for text in ("a", "b"):
        assert max(ranks.run(compare, [text] * 4)) < 5


def test_difference_is_an_error_on_every_rank(ranks):
    start = time.monotonic()
    common = "torch 1\ngraph 7\nshapes 3"
    outcomes = ranks.outcomes(compare, [common, common, common.replace("7", "8"), common])
    for outcome in outcomes:
        with pytest.raises(DisagreementError, match=r"\[0, 1, 3\] agree; rank\(s\) \[2\] differ .*'graph 8' instead of 'graph 7'"):
            raise outcome
    assert time.monotonic() - start < 20
    assert max(ranks.run(compare, ["same"] * 4)) < 5  # and the ranks can go on


def test_independent_groups_may_differ(ranks):
    ranks.run(compare, ["a", "a", "b", "b"], ulysses=2, ring=1)


def test_a_rank_that_never_comes_is_named(ranks):
    outcomes = ranks.outcomes(compare, ["a"] * 4, silent=(3,), timeout_s=1)
    assert not isinstance(outcomes[3], BaseException)
    for outcome in outcomes[:3]:
        with pytest.raises(DisagreementError, match=r"rank\(s\) \[3\] did not reach"):
            raise outcome
    assert max(ranks.run(compare, ["same"] * 4)) < 5


def heard():
    mesh = build_mesh(2, 1)
    return everybody_says(f"rank {dist.get_rank()}", mesh)


def test_everybody_hears_everybody(ranks):
    first, second = ({r: f"rank {r}" for r in pair} for pair in ((0, 1), (2, 3)))
    assert ranks.run(heard) == [first, first, second, second]
    assert everybody_says("alone", build_mesh(1, 1)) == {0: "alone"}
