import time

import pytest
import torch

from seqpar.runtime.groups import all_reduce, start_all_gather, start_all_to_all, start_ring_exchange, wait
from seqpar.runtime.simulate import MismatchError, SimulatedWorld


def everyone(world, f):
    return world.run([lambda groups, rank=rank: f(rank, groups) for rank in range(world.size)])


def test_groups_follow_the_rank_formula():
    world = SimulatedWorld(2, 3)

    def members(rank, groups):
        x = torch.tensor([rank])
        return [wait(start_all_gather(x, groups[axis])).tolist() for axis in ("ulysses", "ring", "sp")]

    results = everyone(world, members)
    assert results[3] == [[2, 3], [1, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert results[4] == [[4, 5], [0, 2, 4], [0, 1, 2, 3, 4, 5]]


def test_all_to_all_with_uneven_and_empty_splits():
    sizes = [[1, 2, 0], [0, 1, 3], [2, 0, 1]]  # sizes[source][target]
    data = [torch.arange(sum(row)) + 10 * r for r, row in enumerate(sizes)]

    def f(rank, groups):
        out = [row[rank] for row in sizes]
        return wait(start_all_to_all(data[rank], out, sizes[rank], groups["sp"])).tolist()

    world = SimulatedWorld(3, 1)
    assert everyone(world, f) == [[0, 20, 21], [1, 2, 10], [11, 12, 13, 22]]
    assert [t.bytes["all_to_all"] for t in world.traffic] == [16, 16, 24]


def test_ring_exchange_takes_from_the_previous_rank():
    world = SimulatedWorld(1, 3)
    results = everyone(world, lambda r, g: wait(start_ring_exchange(torch.full((r,), r), (r - 1) % 3, g["ring"])).tolist())
    assert results == [[2, 2], [], [1]]
    assert [t.calls["ring"] for t in world.traffic] == [1, 1, 1]
    assert [t.bytes["ring"] for t in world.traffic] == [16, 0, 8]


@pytest.mark.parametrize(("op", "expected"), [("sum", 7.0), ("avg", 3.5), ("max", 4.0), ("min", 3.0), ("product", 12.0)])
def test_all_reduce(op, expected):
    world = SimulatedWorld(2, 1)
    xs = [torch.full((5,), 3.0), torch.full((5,), 4.0)]
    results = everyone(world, lambda rank, groups: all_reduce(xs[rank], op, groups["sp"]))
    assert all(torch.equal(result, torch.full((5,), expected)) for result in results)
    assert world.traffic[0].bytes["all_reduce"] == 20 and xs[0][0] == 3


def test_complex_sum():
    z = torch.tensor([1 + 2j])
    results = everyone(SimulatedWorld(2, 1), lambda rank, groups: all_reduce(z * (rank + 1), "sum", groups["sp"]))
    assert all(torch.equal(result, z * 3) for result in results)


def test_results_are_not_shared_between_ranks():
    def f(rank, groups):
        result = wait(start_all_gather(torch.tensor([1.0]), groups["sp"]))
        return result.add_(rank).tolist()

    assert everyone(SimulatedWorld(2, 1), f) == [[1, 1], [2, 2]]


def test_grad_mode_is_inherited():
    with torch.no_grad():
        assert everyone(SimulatedWorld(2, 1), lambda *_: torch.is_grad_enabled()) == [False, False]
    assert everyone(SimulatedWorld(2, 1), lambda *_: torch.is_grad_enabled()) == [True, True]


def fail_on_rank_1(rank, groups):
    if rank == 1:
        raise ValueError("broken")
    return start_all_gather(torch.ones(1), groups["sp"])


def finish_early_on_rank_1(rank, groups):
    return rank == 1 or start_all_gather(torch.ones(1), groups["sp"])


def different_kinds(rank, groups):
    return all_reduce(torch.ones(1), "sum", groups["sp"]) if rank else start_all_gather(torch.ones(1), groups["sp"])


def different_sizes(rank, groups):
    return start_all_to_all(torch.ones(4), [2, 2], [2 + rank, 2 - rank], groups["sp"])


def different_shapes(rank, groups):
    return start_all_gather(torch.ones(1 + rank), groups["sp"])


@pytest.mark.parametrize(
    ("f", "error", "words"),
    [
        (fail_on_rank_1, ValueError, "broken"),
        (finish_early_on_rank_1, MismatchError, "rank 1 of its group is gone"),
        (different_kinds, MismatchError, "different calls"),
        (different_sizes, MismatchError, "which send"),
        (different_shapes, MismatchError, "differ"),
    ],
)
def test_disagreement_raises_and_never_hangs(f, error, words):
    start = time.monotonic()
    with pytest.raises(error, match=words) as caught:
        everyone(SimulatedWorld(2, 1), f)
    assert "simulated rank" in caught.value.__notes__[-1]
    assert time.monotonic() - start < 5
