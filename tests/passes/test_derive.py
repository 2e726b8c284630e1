"""Entries of a plan from a marked graph, and lists of blocks taken as one sequence."""

import pytest
import torch
from torch import nn

from seqpar.partitioner.declare import MeshRules
from seqpar.partitioner.division import Degrees
from seqpar.passes import derive
from seqpar.passes.boundary import Boundary, Mark, Marks
from seqpar.passes.derive_reason import reason
from seqpar.passes.trace import trace

WIDTH = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, table):
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x + table).chunk(3, -1))
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Unified(nn.Module):
    """Text and image are joined inline: a plan can still enter and leave the blocks."""

    def __init__(self):
        super().__init__()
        self.text, self.image = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, text, image):
        x = torch.cat([self.text(text), self.image(image)], 1)
        table = torch.linspace(0, 1, x.shape[1])[:, None].expand(-1, WIDTH)
        for block in self.blocks:
            x = block(x, table)
        return x[:, text.shape[1] :]


@pytest.fixture(scope="module")
def problem():
    inputs = (torch.randn(1, 5, WIDTH), torch.randn(1, 11, WIDTH))
    traced = trace(Unified(), inputs, {}, dynamic=False, marks=Marks(lambda *_: Mark()))

    def read(begin=()):
        return derive.pose(traced.gm.graph, Degrees(2, 1), MeshRules(), lambda node: True, begin=begin)

    return read


def anywhere(place, change):
    return True


def test_parts_that_ranks_do_not_divide_have_no_plan(problem):
    plain = problem()
    assert not derive.declare(plain, anywhere).feasible
    assert "positions are not divided by 2 ranks" in reason(plain, derive.declare(plain, anywhere, strict=False))


def test_blocks_are_entered_and_left_as_one_sequence(problem):
    plain = problem()
    assert derive.block_lists(plain) == ["blocks"]
    begin = derive.beginnings(plain, "blocks")
    one = problem(begin)
    answer = derive.declare(one, lambda place, change: place.module.startswith("blocks."))
    assert answer.feasible
    entries = {(str(e.boundary), e.change, e.dim, e.dims) for e in derive.entries(one, answer.labels)}
    assert entries == {
        ("input 'x' of blocks.0", "split", 1, 3),
        ("input 'table' of blocks.0", "split", 0, 2),
        ("input 'table' of blocks.1", "split", 0, 2),
        ("output 0 of blocks.1", "gather", 1, 3),
    }


def test_equal_boundaries_of_blocks_have_one_key():
    first, second = (derive.folded_key(Boundary(f"blocks.{i}.attn", "input", "x")) for i in (0, 11))
    assert first == second == ("blocks.*.attn", "input", "x", None)
    assert derive.folded_key(Boundary("blocks.0", "output", 0)) != derive.folded_key(Boundary("blocks.0", "input", 0))
