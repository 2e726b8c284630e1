"""Many signatures in one process on one compiled model: right answers, a bounded number of programs, and nothing left of forgotten ones.

Four ranks are simulated behind the module that `sp_compile` returns, so every answer went through their exchanges.
"""

import dataclasses
import gc
import random
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.compile import Compiler, Settings
from seqpar.models.randomise import randomise
from seqpar.module import SequenceParallelModule
from seqpar.passes.pipeline import partition
from seqpar.verification import simulate

WIDTH, HEADS = 16, 4
# batch, image tokens, length of the text, hidden tokens of its last row
SIGNATURES = [
    (1, 8, 5, 0), (1, 9, 5, 0), (1, 16, 5, 0), (1, 15, 7, 0), (1, 12, 4, 0), (1, 5, 9, 0), (1, 8, 5, 2), (1, 9, 5, 2), (1, 8, 5, 3), (1, 3, 4, 1),
    (2, 8, 5, 0), (2, 9, 5, 0), (2, 16, 7, 0), (2, 8, 5, 2), (2, 8, 5, 3), (2, 11, 8, 3), (2, 2, 2, 0), (3, 8, 5, 0), (3, 9, 6, 1), (3, 8, 1, 0),
]  # fmt: skip


class Joint(nn.Module):
    """Attention over image and text, masked only if some text is padding; tokens that are padding in every row are cut off."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, image, text, mask):
        self.calls += 1
        longest = int(mask.sum(1).max())
        text, mask = text[:, :longest], mask[:, :longest]
        joint = torch.cat([text, image], dim=1)
        q, k, v = self.qkv(joint).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        keep = None if mask.all() else F.pad(mask, (0, image.shape[1]), value=True)[:, None, None, :]
        y = self.out(F.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).flatten(2))
        return y[:, longest:], y[:, :longest].mean(1)


class SimulatedCompiler(Compiler):
    """Programs that run all ranks in this process."""

    def emit(self, traced):
        program, fingerprint = super().emit(traced)
        partitioned = partition(traced, ulysses=self.settings.ulysses, ring=self.settings.ring)
        return dataclasses.replace(program, run=lambda *tensors: simulate(partitioned, tensors)[0], split=True), fingerprint


def inputs(batch, tokens, length, hidden, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length - hidden :] = False
    return torch.randn(batch, tokens, WIDTH, generator=generator), torch.randn(batch, length, WIDTH, generator=generator), mask


def compiled(model, dynamic, max_programs):
    args = inputs(*SIGNATURES[0])
    return SequenceParallelModule(model, SimulatedCompiler(model, Settings(2, 2, dynamic)), args, {}, max_programs=max_programs)


def check(fast, model, signature, seed):
    with torch.no_grad():
        args = inputs(*signature, seed)
        before = model.calls.item()
        expected = model(*args)
        got = fast(*args)
        assert model.calls.item() == before + 2, "what the model writes to its buffers is written once a call"
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-5 * theirs.norm(), signature


def held(fast):
    return sum(len(found.programs) for found in fast._programs.values())


@pytest.mark.parametrize(("dynamic", "max_programs"), [(None, 32), (False, 6)])
def test_twenty_signatures_in_any_order(dynamic, max_programs):
    model = randomise(Joint()).eval()
    fast = compiled(model, dynamic, max_programs)
    count = len(SIGNATURES) if dynamic is None else 10
    for signature in random.Random(0).sample(SIGNATURES, count):
        check(fast, model, signature, seed=0)
        assert held(fast) <= max_programs and len(fast._fast) <= max_programs
    assert len(set(SIGNATURES)) == 20
    if dynamic is None:
        assert len({id(program) for found in fast._programs.values() for program in found.programs}) < 20, "some lengths share a program"
        for signature in SIGNATURES:
            check(fast, model, signature, seed=1)


def test_the_mask_may_change_at_every_call():
    model = randomise(Joint()).eval()
    fast = compiled(model, False, 32)
    for seed, hidden in enumerate((0, 2, 0, 3, 2, 0, 3, 1)):
        check(fast, model, (1, 8, 5, hidden), seed)
    assert len(fast._programs) == 1 and held(fast) == 4, "one shape, a program for each length of the text"


def alive():
    """Numbers of objects that belong to programs. (Torch keeps some symbols of dead programs in caches of a fixed size.)"""
    gc.collect()
    kinds = ("GraphModule", "Graph", "Partitioned", "Specialisation", "Traced")
    counts = Counter(kind.__name__.partition(".")[0] for kind in map(type, gc.get_objects()))
    return {kind: counts[kind] for kind in kinds}


def test_forgotten_programs_leave_nothing_behind():
    model = randomise(Joint()).eval()
    fast = compiled(model, None, 1)
    seen, counts = [], []
    for seed in range(3):
        for signature in ((1, 8, 5, 0), (2, 8, 5, 2)):
            check(fast, model, signature, seed)
            seen.append(weakref.ref(fast.graph_module))
        counts.append(alive())
    assert counts[1] == counts[2], "nothing grows from round to round"
    assert len({ref() for ref in seen} - {None}) == 1
    del fast
    gc.collect()
    assert all(ref() is None for ref in seen)
