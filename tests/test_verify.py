"""`seqpar.verify` finds the first wrong node and its source line; plans are JSON; replicated values are the same bits everywhere."""

import json

import pytest
import torch
from torch import nn

import seqpar
from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.partitioner.registry import registry as rules
from seqpar.passes import attend, emit
from seqpar.passes.pipeline import partition
from seqpar.passes.plan import Plan
from seqpar.passes.trace import trace
from seqpar.runtime.layout import gather
from seqpar.runtime.ulysses import seq_to_heads
from seqpar.verification import COMM_TOLERANCE, Report, simulate

aten = torch.ops.aten


class Attention(nn.Module):
    """Self-attention over [text | image]; a running sum that needs every position."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, image, text):
        x = torch.cat([text, image], dim=1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        total = torch.cumsum(self.out(y), dim=1)  # divergence of a wrong rule
        return {"image": total[:, text.shape[1] :], "text": total[:, : text.shape[1]]}


@pytest.fixture
def model():
    return randomise(Attention()).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.randn(2, 9, 16, generator=generator), "text": torch.randn(2, 5, 16, generator=generator)}


def line_of(text):
    with open(__file__, encoding="utf-8") as file:
        return next(number for number, line in enumerate(file, 1) if text in line)


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_a_correct_program(model, inputs, ulysses, ring):
    report = seqpar.verify(model, inputs, ulysses=ulysses, ring=ring)
    assert isinstance(report, Report) and isinstance(report.plan, Plan)
    assert report.ok is True and report.first_divergence is None
    assert 0 <= report.max_rel_err <= 1e-5 and 0 <= report.max_abs_err < 1e-3
    assert report.plan.world_size == ulysses * ring and str(report).startswith("ok")


def test_positional_inputs_and_degrees_default_to_one(model, inputs):
    assert seqpar.verify(model, (inputs["image"], inputs["text"])).plan.world_size == 1


def test_inputs_that_were_computed_with_gradients(model):
    """Earlier keys that the model itself made, say."""
    weight = torch.randn(16, 16, requires_grad=True)
    computed = {"image": torch.randn(2, 9, 16) @ weight, "text": torch.randn(2, 5, 16) @ weight}
    assert seqpar.verify(model, computed, ulysses=2).ok and all(tensor.grad_fn for tensor in computed.values())


def test_a_model_that_counts_its_calls_is_compared_from_one_state():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x_BSD):
            self.calls += 1
            return self.calls * nn.functional.scaled_dot_product_attention(x_BSD, x_BSD, x_BSD)

    report = seqpar.verify(Counting(), (torch.randn(2, 9, 16),), ulysses=2)
    assert report.ok, str(report)


@pytest.mark.parametrize(("width", "rounds"), [(1e6, True), (0.0, False)])
def test_a_difference_is_told_from_rounding(model, inputs, monkeypatch, width, rounds):
    """Large numbers that cancel: no float32 result of it is exact. Here the program is wrong besides, or nothing but wrong."""
    monkeypatch.setitem(rules._rules, aten.cumsum.default, rules.find(aten.sigmoid.default))

    class Cancelling(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, image, text):
            out = self.inner(image, text)
            return {name: (value + width) - width for name, value in out.items()}

    report = seqpar.verify(Cancelling().eval(), inputs, ulysses=2)
    assert not report.ok and report.rounding is not None and (report.rounding > 1e-4) == rounds
    assert ("compare model.double()" in str(report)) == rounds
    assert seqpar.verify(nn.Sequential(nn.Flatten(0, 0)), (torch.randn(3, 4),)).rounding is None


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (2, 2)])
def test_a_wrong_rule_is_found_where_it_is_used(model, inputs, monkeypatch, ulysses, ring):
    monkeypatch.setitem(rules._rules, aten.cumsum.default, rules.find(aten.sigmoid.default))
    report = seqpar.verify(model, inputs, ulysses=ulysses, ring=ring)
    assert not report.ok and report.max_rel_err > 1e-3
    assert report.first_divergence.startswith("cumsum (aten.cumsum.default) on rank")
    assert report.first_divergence.endswith(f"test_verify.py:{line_of('# divergence of a wrong rule')}")
    assert "DIFFERS, first at cumsum" in str(report)


def heads_to_seq_of_another_rank(x, segments, heads, *, group):
    """Wrong: heads come in another order."""
    return attend.right_heads_to_seq(x.flip(1), segments, heads, group=group)


def test_a_wrong_exchange_is_found_at_the_attention(model, inputs, monkeypatch):
    monkeypatch.setattr(attend, "right_heads_to_seq", attend.heads_to_seq, raising=False)
    monkeypatch.setattr(attend, "heads_to_seq", heads_to_seq_of_another_rank)
    report = seqpar.verify(model, inputs, ulysses=2)
    assert not report.ok
    assert report.first_divergence.startswith("scaled_dot_product_attention (")
    assert report.first_divergence.endswith(f"test_verify.py:{line_of('y = nn.functional.scaled_dot')}")


def gather_reversed(x, dim, segments, *, group):
    """Wrong: the parts come in the wrong order."""
    return gather(x, dim, segments, group=group).flip(dim)


def gather_own_part_only(x, dim, segments, *, group):
    """Wrong: no communication; every rank sees its own part everywhere."""
    whole = gather(x, dim, segments, group=group)
    return whole.narrow(dim, 0, 1).expand_as(whole).contiguous()


@pytest.mark.parametrize("wrong", [gather_reversed, gather_own_part_only])
def test_a_wrong_gather_is_found_at_its_reader(model, inputs, monkeypatch, wrong):
    monkeypatch.setattr(emit, "gather", wrong)
    report = seqpar.verify(model, inputs, ulysses=2, ring=2)
    assert not report.ok and report.first_divergence.startswith("cumsum (")


def failing_exchange(tensors, segments, heads, *, group):
    """A program that cannot even run is a report, or an error: never ok."""
    raise ValueError("the exchange failed")


def test_a_program_that_fails_is_not_ok(model, inputs, monkeypatch):
    assert attend.seq_to_heads is seq_to_heads
    monkeypatch.setattr(attend, "seq_to_heads", failing_exchange)
    with pytest.raises(ValueError, match="the exchange failed"):
        seqpar.verify(model, inputs, ulysses=2)


def test_plan_is_json_with_the_promised_keys(model, inputs):
    plan = seqpar.plan(model, inputs, ulysses=2, ring=2)
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["world_size"] == 4 and isinstance(found["flops_total"], int)
    assert isinstance(found["flops_per_rank"], list) and len(found["flops_per_rank"]) == 4
    assert 0 < found["sharded_flop_fraction"] <= 1
    whole, busiest = found["flops_total"], max(found["flops_per_rank"])
    assert found["sharded_flop_fraction"] == pytest.approx((whole - busiest) / (whole * (1 - 1 / 4)))
    kinds = {"all_to_all", "ring", "all_gather", "all_reduce"}
    assert found["comm_bytes_per_rank"].keys() == found["comm_calls"].keys() >= kinds
    assert found["comm_calls"]["all_to_all"] == 2 and found["comm_calls"]["ring"] == 1
    assert all((found["comm_bytes_per_rank"][kind] > 0) == (calls > 0) for kind, calls in found["comm_calls"].items())
    assert found["seconds"].keys() == {"trace", "infer", "solve", "rewrite"} and all(s >= 0 for s in found["seconds"].values())
    (attention,) = found["attention"]
    assert attention["strategy"] == "ulysses+ring" and attention["why"] and "test_verify.py:" in attention["source"]


def test_replicated_operators_in_the_plan():
    family = registry.get("flux")
    config = family.tiny_config(4, 1)
    inputs = family.grid_inputs(config, rows=3, columns=5, text_len=3, device="meta")
    found = json.loads(json.dumps(seqpar.plan(family.build(config, device="meta"), inputs, ulysses=2, ring=2).to_dict()))
    assert found["replicated_ops"]
    for op in found["replicated_ops"]:
        assert op.keys() == {"node", "op", "reason", "flops", "source"} and op["reason"] and ".py:" in op["source"]
    # All replicated work is listed: it explains what is not sharded.
    listed = sum(op["flops"] for op in found["replicated_ops"])
    assert 0 < listed <= max(found["flops_per_rank"])


def test_meta_and_real_plans_are_equal(model, inputs):
    on_meta = Attention().to("meta").eval()
    plans = [seqpar.plan(m, {name: x.to(device) for name, x in inputs.items()}, ulysses=2, ring=2).to_dict() for m, device in ((model, "cpu"), (on_meta, "meta"))]
    for plan in plans:
        plan.pop("seconds")
    assert plans[0] == plans[1]


@pytest.mark.parametrize("name", ["flux", "wan", "z-image", "bagel"])
@pytest.mark.parametrize(("ulysses", "ring"), [(1, 4), (2, 2)])
def test_values_every_rank_holds_are_the_same_bits(name, ulysses, ring):
    family = registry.get(name)
    config = family.tiny_config(5, 1)
    inputs = family.grid_inputs(config, rows=3, columns=5, text_len=3)
    partitioned = partition(trace(randomise(family.build(config)), (), inputs, dynamic=False), ulysses=ulysses, ring=ring)
    seen = {}

    def watch(rank, node, value):
        name_and_layout = node.meta.get("seqpar_value")
        if name_and_layout and isinstance(value, torch.Tensor) and not any(name_and_layout[1]):
            seen.setdefault(name_and_layout[0], {})[rank] = value

    traced = partitioned.traced
    simulate(partitioned, [traced.call.leaves[i].contiguous() for i in traced.input_positions], watch)
    assert seen
    for node, values in seen.items():
        assert len(values) == 4 and all(torch.equal(values[0], value) for value in values.values()), node


@pytest.mark.parametrize(("comm_dtype", "share", "mesh"), [(torch.bfloat16, 2, (2, 2)), (torch.float8_e4m3fn, 4, (2, 1)), (torch.float8_e4m3fn, 4, (1, 3))])
def test_exchanges_in_fewer_bytes(comm_dtype, share, mesh):
    model, inputs = randomise(Attention()).eval(), {"image": torch.randn(2, 25, 16), "text": torch.randn(2, 3, 16)}
    plain = seqpar.verify(model, inputs, ulysses=mesh[0], ring=mesh[1])
    report = seqpar.verify(model, inputs, ulysses=mesh[0], ring=mesh[1], comm_dtype=comm_dtype)
    assert plain.ok and plain.tolerance == 1e-5 and report.ok, (str(plain), str(report))
    assert 1e-4 < report.max_rel_err <= report.tolerance == COMM_TOLERANCE[comm_dtype] and f"exchanged as {report.plan.comm_dtype})" in str(report)
    for kind in ("all_to_all", "ring"):
        before, after = (r.plan.comm_bytes_per_rank[kind] for r in (plain, report))
        assert before / share <= after <= before / share + 8 * 4 * report.plan.comm_calls[kind], "and a scale per tensor"
        assert plain.plan.comm_calls[kind] == report.plan.comm_calls[kind]
    assert report.plan.comm_bytes_per_rank["all_gather"] == plain.plan.comm_bytes_per_rank["all_gather"]
    assert f"rounded   to {report.plan.comm_dtype}" in report.plan.explain() and "rounded" not in plain.plan.explain()


def test_a_model_in_half_precision_is_not_rounded_to_what_it_has(inputs):
    model, inputs = randomise(Attention()).to(torch.bfloat16), {k: v.to(torch.bfloat16) for k, v in inputs.items()}
    plain, report = (seqpar.verify(model, inputs, ulysses=2, comm_dtype=comm_dtype) for comm_dtype in (None, torch.bfloat16))
    assert (plain.max_abs_err, plain.plan.comm_bytes_per_rank) == (report.max_abs_err, report.plan.comm_bytes_per_rank)
