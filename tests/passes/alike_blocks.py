"""Blocks and a model of them, for tests of what copies of alike blocks may leave out."""

import torch
from torch import nn

COUNT, WIDTH = 6, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), nn.Dropout(0.5)
        self.register_buffer("table", torch.ones(WIDTH))

    def work(self, x):
        return x + self.drop(self.down(self.up(self.norm(x)).relu())) * self.table

    def forward(self, x):
        return self.work(x)


class Model(nn.Module):
    def __init__(self, kind=Block, count=COUNT):
        super().__init__()
        self.blocks = nn.ModuleList([kind() for _ in range(count)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class WritesToBuffer(Block):
    def forward(self, x):
        self.table.add_(1)
        return self.work(x)


class AssignsBuffer(Block):
    def forward(self, x):
        self.table = self.table + 1
        return self.work(x)
