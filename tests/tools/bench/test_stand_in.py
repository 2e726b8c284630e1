"""Stand-in collectives: a rank's program that runs alone, as a module."""

import torch

from seqpar.tools.bench.stand_in import Pool, stand_ins


def test_results_have_the_right_shapes_and_one_memory():
    pool = Pool()
    groups = stand_ins(2, 3, 3, pool)  # ring index 1, ulysses index 1
    assert {axis: (group.size, group.rank) for axis, group in groups.items()} == {"ulysses": (2, 1), "ring": (3, 1), "sp": (6, 3)}
    flat = torch.zeros(10)
    received = groups["ulysses"].all_to_all(flat, [3, 4], [5, 5], "all_to_all")
    assert received.shape == (7,) and received.std() > 0.1  # no zeros: what kernels draw in power depends on the values
    gathered = groups["ring"].all_gather(torch.zeros(2, 3))
    assert gathered.shape == (6, 3) and gathered.is_contiguous()
    assert groups["sp"].all_gather(torch.zeros(2, 3)).shape == (12, 3)
    assert groups["ring"].all_to_all(flat, [0, 0, 5], [5, 5, 0], "ring").data_ptr() == groups["sp"].all_gather(flat[:1]).data_ptr()
    pool.fresh = True
    assert groups["ring"].all_gather(flat).data_ptr() != groups["ring"].all_gather(flat[:1]).data_ptr()
    assert groups["sp"].all_gather(torch.ones(2, dtype=torch.int64)).dtype == torch.int64
    assert torch.equal(groups["sp"].all_reduce(torch.ones(2), "sum"), torch.ones(2))
