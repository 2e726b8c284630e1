"""One trace and one partition with symbolic lengths serve other resolutions and prompt lengths, in one process and on real ranks."""

import functools
import inspect
import logging

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from seqpar.compile import sp_compile
from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.passes.arguments import canonical_call
from seqpar.passes.guards import failed_guard
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import compare, simulate

MESHES = {"u2": (2, 1), "r2": (1, 2), "u2r2": (2, 2)}
# rows, columns, frames, text length; the program is made for the first
RESOLUTIONS = ((4, 4, 2, 8), (5, 3, 3, 7), (7, 3, 2, 13))  # at least as many rows as ranks: tiny models are cut between rows
# The text and image parts each have a length of their own, ids as many rows, and neither is shorter than the ranks.
MOST_CONDITIONS = {"flux": 5, "longcat-image": 5, "wan": 2}


@functools.cache
def compiled_once(name):
    """(model, a call of it for each resolution, its one symbolic trace)"""
    family = registry.get(name)
    config = family.tiny_config(4, 1)
    model = randomise(family.build(config))
    calls = []
    for rows, columns, frames, text_len in RESOLUTIONS:
        times = 1 if family.frames_per_token == 1 else frames
        calls.append(family.grid_inputs(config, rows=rows, columns=columns, times=times, text_len=text_len))
    return model, calls, trace(model, (), calls[0])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MOST_CONDITIONS)
def test_one_partition_serves_three_resolutions(name, mesh):
    model, calls, traced = compiled_once(name)
    assert traced.shape_env is not None
    ulysses, ring = MESHES[mesh]
    partitioned = partition(traced, ulysses=ulysses, ring=ring)
    conditions = partitioned.conditions
    assert len(conditions) <= MOST_CONDITIONS[name], conditions
    # Lengths may be tied to each other's and bounded below, never fixed.
    assert not any(isinstance(c, sympy.Eq) and (c.lhs.is_number or c.rhs.is_number) for c in conditions), conditions
    for inputs in calls:
        leaves = canonical_call(inspect.signature(model.forward), (), inputs).leaves
        tensors = [leaves[i].contiguous() for i in traced.input_positions]
        assert failed_guard(traced, [t.shape for t in tensors], conditions) is None
        with torch.no_grad():
            expected = [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, torch.Tensor)]
        _, relative, ok = compare(expected, simulate(partitioned, tensors))
        assert ok and relative <= 1e-5


@pytest.mark.parametrize("name", MOST_CONDITIONS)
def test_lengths_shorter_than_the_ranks_do_not_fit_the_program(name):
    model, calls, traced = compiled_once(name)
    conditions = partition(traced, ulysses=2, ring=2).conditions
    leaves = canonical_call(inspect.signature(model.forward), (), calls[0]).leaves
    shapes = [list(leaves[i].shape) for i in traced.input_positions]
    text = [node.name for node in traced.gm.graph.nodes if node.op == "placeholder"].index("encoder_hidden_states")
    shapes[text][1] = 3
    assert failed_guard(traced, shapes, conditions) is not None


def run_three_resolutions(name):
    family = registry.get(name)
    config = family.tiny_config(4, 1)
    model = randomise(family.build(config))
    messages = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("seqpar.compile")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    errors = []
    with torch.no_grad():
        fast = None
        for rows, columns, _, text_len in RESOLUTIONS:
            inputs = family.grid_inputs(config, rows=rows, columns=columns, text_len=text_len)
            fast = fast or sp_compile(model, inputs, ulysses=2, ring=2)
            actual, expected = fast(**inputs)[0], model(**inputs)[0]
            errors.append(((actual - expected).norm() / expected.norm()).item())
    logger.removeHandler(handler)
    programs = {id(found.program) for found in fast._programs.values()}
    return errors, len(programs), messages


def test_one_compilation_on_real_ranks(ranks):
    for errors, programs, messages in ranks.run(run_three_resolutions, "flux", timeout=300):
        assert max(errors) <= 1e-5 and programs == 1
        assert ["compiled in" in message for message in messages] == [True, False, False]
        assert all("reused" in message for message in messages[1:])


class Frames(nn.Module):
    """Tokens of a frame [B, frames, tokens, C] attend to each other: the dim in the place of heads is as long as the clip."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))).mean(1)


class Folded(nn.Module):
    """Heads and batch in one dim, as with `bmm`."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (3, 16)).transpose(1, 2).flatten(0, 1) for y in self.qkv(x).chunk(3, -1))
        y = torch.bmm((torch.bmm(q, k.mT) / 4).softmax(-1), v)
        return x + self.out(y.unflatten(0, (-1, 3)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize(("model", "shape", "other"), [(Frames, (1, 6, 101, 48), (1, 8, 101, 48)), (Folded, (2, 101, 48), (4, 101, 48))])
def test_a_number_of_heads_that_is_symbolic_is_a_condition(model, shape, other, mesh):
    """Which heads a rank has is written into its program: with other heads it would leave some out, or read beyond the last."""
    torch.manual_seed(0)
    traced = trace(model().eval(), (torch.randn(shape),), {}, dynamic=True)
    partitioned = partition(traced, ulysses=mesh[0], ring=mesh[1])
    assert partitioned.plan.attention[0].strategy.startswith("ulysses")
    assert failed_guard(traced, [shape], partitioned.conditions) is None
    assert failed_guard(traced, [other], partitioned.conditions) is not None
    assert partition(traced, ring=4).conditions == [c for c in partition(traced, ring=4).conditions if not isinstance(c, sympy.Eq)]
