"""Statistics over divided positions equal torch's over the whole."""

import pytest
import torch
import torch.nn.functional as F

from seqpar.runtime.layout import parts_of, shard
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.runtime.statistics import deviation_and_mean, euclidean_norm, group_norm, variance_and_mean


def on_ranks(ranks, fn):
    """Results of fn(rank, group) on every rank."""
    return SimulatedWorld(1, ranks).run([lambda groups, r=r: fn(r, groups["sp"]) for r in range(ranks)])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("length", [3, 9])  # 3: a rank without positions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("correction", "keepdim"), [(1, True), (0, False)])
def test_moments(ranks, length, dtype, correction, keepdim):
    x = (torch.randn(2, length, 5, generator=torch.Generator().manual_seed(0)) + 100).to(dtype)  # a large mean must not cancel
    expected = torch.var_mean(x, (1, 2), correction=correction, keepdim=keepdim)

    def run(rank, group):
        part = shard(x, 1, [parts_of(length, ranks)], rank=rank)
        return variance_and_mean(part, [1, 2], correction, keepdim, length * 5, group=group), deviation_and_mean(part, [1, 2], correction, keepdim, length * 5, group=group)

    for found, (root, _) in on_ranks(ranks, run):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(root, expected[0].sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norm(dtype):
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for found in on_ranks(3, lambda rank, group: euclidean_norm(shard(x, 1, [parts_of(7, 3)], rank=rank), [1], True, group=group)):
        torch.testing.assert_close(found, torch.linalg.vector_norm(x, dim=1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
def test_group_norm_of_divided_positions(affine, dtype):
    x = (torch.randn(2, 6, 7, 3, generator=torch.Generator().manual_seed(0)) * 3 + 5).to(dtype)
    weight, bias = (torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)) if affine else (None, None)
    expected = F.group_norm(x.float(), 3, weight, bias, 1e-5)
    segments = ((4, 0, 3),)
    found = on_ranks(3, lambda rank, group: group_norm(shard(x, 2, segments, rank=rank), 3, weight, bias, 1e-5, 7 * 3, group=group))
    for rank, result in enumerate(found):
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), shard(expected, 2, segments, rank=rank), rtol=0, atol=1e-5 if dtype == torch.float32 else 4e-2)
