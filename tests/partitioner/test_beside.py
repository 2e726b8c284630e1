"""Work that no attention's sequence reaches is divided along a dim that is long enough, whatever comes first in the graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqpar

WIDTH, SIDE = 64, 4


class Windows(nn.Module):
    """A patch embedding, attention within windows of SIDE x SIDE, and an MLP: most of the work has rows and columns, no window."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(4, WIDTH, 2, 2)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, picture):
        x = self.patches(picture).permute(0, 2, 3, 1)
        batch, height, width, _ = x.shape
        y = x.view(batch, height // SIDE, SIDE, width // SIDE, SIDE, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, SIDE * SIDE, WIDTH)
        q, k, v = self.qkv(y).view(-1, SIDE * SIDE, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, SIDE * SIDE, WIDTH))
        x = x + y.view(batch, height // SIDE, width // SIDE, SIDE, SIDE, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, WIDTH)
        return x + self.down(F.relu(self.up(x)))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_small_batch_is_no_sequence(batch, ranks):
    torch.manual_seed(0)
    report = seqpar.verify(Windows().eval(), (torch.randn(batch, 4, 64, 64),), ulysses=ranks)
    assert report.ok and report.plan.sharded_flop_fraction > 0.98, report
