"""A convolution over parts with halos equals the convolution over the whole."""

import pytest
import torch
import torch.nn.functional as F

from seqpar.runtime.halo import halo, window
from seqpar.runtime.layout import parts_of, shard
from seqpar.runtime.simulate import SimulatedWorld


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (5, 2), (3, 0)])
@pytest.mark.parametrize("length", [8, 11])
@pytest.mark.parametrize("edges", [False, True])
def test_conv1d(edges: bool, ranks: int, kernel: int, padding: int, length: int) -> None:
    x = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 3, kernel, generator=torch.Generator().manual_seed(1))
    before, after = padding, kernel - 1 - padding
    whole = F.conv1d(F.pad(x, (before, after), mode="replicate" if edges else "constant"), weight)
    segments = [parts_of(length, ranks)]

    def body(rank: int):
        def run(groups):
            part = shard(x, 2, segments, rank=rank)
            return F.conv1d(halo(part, 2, before, after, group=groups["sp"], edges=edges), weight)

        return run

    parts = SimulatedWorld(1, ranks).run([body(r) for r in range(ranks)])
    torch.testing.assert_close(torch.cat(parts, 2), whole)


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 5), (-2, 3), (5, 9), (-1, 10), (9, 12), (-3, -1)])
def test_a_window_has_zeros_or_edges_beyond_the_ends(start: int, stop: int) -> None:
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(window(x, 1, start, stop), F.pad(x, (0, 0, 5, 5))[:, start + 5 : stop + 5])
    assert torch.equal(window(x, 1, start, stop, edges=True), F.pad(x, (0, 0, 5, 5), mode="replicate")[:, start + 5 : stop + 5])
