"""`sp_shard` and `sp_gather`: eager on a mesh, pins in a compiled program, identities elsewhere; and compiled programs with a plan on real ranks."""

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import seqpar
from seqpar import sp_gather, sp_shard
from seqpar.errors import DisagreementError, PlanError
from seqpar.runtime.current import current_mesh
from seqpar.runtime.mesh import SequenceMesh
from seqpar.sp_plan import SequenceParallelConfig, SequenceParallelInput, SequenceParallelOutput, use_mesh


class Tokens(nn.Module):
    """The intrusive style: between shard and gather, nothing but operators on single tokens and attention."""

    def __init__(self, dim=1, gathers=True):
        super().__init__()
        self.to_q, self.out = nn.Linear(8, 8), nn.Linear(8, 3)
        self.dim, self.gathers = dim, gathers

    def forward(self, x):
        x = sp_shard(x, dim=self.dim)
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (self.to_q(x), x, x * 2))
        x = self.out(x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return sp_gather(x, dim=-2) if self.gathers else x


def tokens(length):
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(length))


def make(**options):
    torch.manual_seed(0)
    return Tokens(**options)


@pytest.mark.parametrize(("ulysses", "ring", "dynamic"), [(2, 1, False), (2, 2, True)])
def test_in_a_compiled_program_they_are_pins(ulysses, ring, dynamic):
    report = seqpar.verify(make(), (tokens(9),), ulysses=ulysses, ring=ring, dynamic=dynamic)
    ranks = ulysses * ring
    assert report.ok
    assert [note.partition(" (")[0] for note in report.plan.notes] == ["sp_shard", "sp_gather"]
    assert f"split in dim 1, 9/{ranks} positions" in report.plan.notes[0] and "test_sp_sharding.py:" in report.plan.notes[0]
    assert report.plan.comm_calls["all_gather"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 2}, r"(?s)sp_shard \(.*test_sp_sharding.py:\d+\) splits dim 2 of its tensor, which is not the sequence.*\(2, 9, 8\), its sequence is dim 1.*sp_shard\(x, dim=1\)"),
        ({"gathers": False}, r"(?s)sp_shard \(.*test_sp_sharding.py:\d+\) splits its tensor, and no gather follows: an output of the model stays split in dim 1"),
    ],
)
def test_contradictions(options, message):
    with pytest.raises(PlanError, match=message):
        seqpar.plan(make(**options), (tokens(9),), ulysses=2)


def test_identities_without_a_mesh():
    x = tokens(9)
    assert current_mesh.get() is None
    assert sp_shard(x, 1) is x and sp_gather(x, -1) is x
    with pytest.raises(ValueError, match=r"sp_shard\(x, dim=3\): x has 3 dims \(2, 9, 8\)"):
        sp_shard(x, 3)
    model = make()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


class Routed(nn.Module):
    """Decides by activations, so it runs as it is: whole on every rank."""

    def forward(self, x):
        x = sp_shard(x, 1)
        return sp_gather(x * (2 if (x.mean() > 0).item() else 3), 1)


def test_a_module_that_runs_as_it_is_works_on_whole_tensors():
    model = nn.Sequential(make(), Routed())
    with use_mesh(SequenceMesh(2, 1, 0, {}, None)):
        report = seqpar.verify(model, (tokens(9),), ulysses=2)
    assert report.ok and any("Routed" in op.op for op in report.plan.replicated_ops)


# ---- real ranks -----------------------------------------------------------------------------------


def eager_on_a_mesh(device_count):
    rank, config = dist.get_rank(), SequenceParallelConfig(ulysses_degree=2)
    outside = current_mesh.set(None)
    config.setup(rank, device_count, torch.device("cpu"))
    found = {"ranks": (config.get_rank(), config.get_ulysses_rank(), config.get_ring_rank(), config.get_world_size(), config.get_ulysses_world_size(), config.get_ring_world_size())}
    x = torch.arange(2 * 9 * 3).reshape(2, 9, 3).float()
    part = sp_shard(x, dim=1)
    found["part"] = part.tolist()
    found["whole"] = torch.equal(sp_gather(part, dim=1), x)
    found["unequal"] = sp_gather(torch.full((1, 3 * rank + 1), float(rank)), dim=-1).tolist()
    found["short"] = torch.equal(sp_gather(sp_shard(x[:, :1], 1), 1), x[:, :1])
    with use_mesh(config):
        found["in use_mesh"] = sp_shard(x, 1).shape[1]
    # A model compiled while a mesh is current is traced on whole tensors, and the program reads no mesh.
    model = make()
    fast = seqpar.sp_compile(model, (tokens(9),), ulysses=2)
    ours = fast(tokens(9))
    current_mesh.reset(outside)
    with torch.no_grad():
        found["error"] = (ours - model(tokens(9))).abs().max().item()
    found["backend error"] = (torch.compile(model, backend="seqpar", options={"ulysses": 2, "backend": "eager"})(tokens(9)) - ours).abs().max().item()
    return found


def test_eager_on_two_ranks(two_ranks):
    first, second = two_ranks.run(eager_on_a_mesh, 2)
    assert first["ranks"] == (0, 0, 0, 2, 2, 1) and second["ranks"] == (1, 1, 0, 2, 2, 1)
    x = torch.arange(2 * 9 * 3).reshape(2, 9, 3).float()
    assert torch.equal(torch.tensor(first["part"]), x[:, :5]) and torch.equal(torch.tensor(second["part"]), x[:, 5:])
    for found in (first, second):
        assert found["whole"] and found["short"] and found["unequal"] == [[0.0, 1.0, 1.0, 1.0, 1.0]]
        assert found["in use_mesh"] == len(found["part"][0])
        assert found["error"] < 1e-6 and found["backend error"] < 1e-6


class Attention(nn.Module):
    def forward(self, x):
        h = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(h, h * 2, h * 3).transpose(1, 2).flatten(2)


def compiled_with_a_plan(lengths, differ):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.Linear(8, 3))
    plan = {"0": {"x": SequenceParallelInput(1, auto_pad=True)}, "1": SequenceParallelOutput(1)}
    if differ and dist.get_rank() == 1:
        plan["1"] = SequenceParallelOutput(1, expected_dims=3)
    fast = seqpar.sp_compile(model, (tokens(lengths[0]),), ring=2, sp_plan=plan)
    with torch.no_grad():
        pairs = [(fast(tokens(n)), model(tokens(n))) for n in lengths]
        errors = [((out - expected).norm() / expected.norm()).item() for out, expected in pairs]
    return errors, fast.plan.notes, [str(n.target) for n in fast.graph_module.graph.nodes]


def test_a_compiled_program_with_a_plan(two_ranks):
    for errors, notes, targets in two_ranks.run(compiled_with_a_plan, (9, 12, 17), False):
        assert max(errors) < 1e-6
        assert "plan['0']['x']: split in dim 1, 9/2 positions" in notes
        assert not any("boundary" in target or "clone" in target for target in targets)


def test_ranks_with_different_plans_disagree(two_ranks):
    outcomes = two_ranks.outcomes(compiled_with_a_plan, (9,), True)
    assert all(isinstance(outcome, DisagreementError) for outcome in outcomes), outcomes
