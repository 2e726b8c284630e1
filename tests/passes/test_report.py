"""What `explain()` says of real models: the page, and that its numbers are those of the counts."""

import pickle

import pytest
import torch
from expecttest import assert_expected_inline

from seqpar.errors import UnsupportedError
from seqpar.models import registry
from seqpar.partitioner.solve import solve
from seqpar.passes.pipeline import partition
from seqpar.passes.plan import Plan
from seqpar.passes.trace import trace
from seqpar.runtime.counting import KINDS

NAMES = ("flux", "wan")


@pytest.fixture(scope="module")
def traced():
    """Tiny models of 2 blocks (of each kind) on the meta device, by name."""
    found = {}
    for name in NAMES:
        family = registry.get(name)
        config = family.tiny_config(heads=4, layers=2)
        inputs = family.grid_inputs(config, rows=8, columns=8, text_len=16, device="meta")
        found[name] = trace(family.build(config, device="meta"), (), inputs, dynamic=False)
    return found


@pytest.fixture(scope="module")
def partitions(traced):
    return {name: partition(one, ulysses=2, ring=2) for name, one in traced.items()}


def without_seconds(text):
    return "\n".join(line for line in text.splitlines() if not line.startswith("seconds"))


def test_one_page_of_two_kinds_of_blocks(partitions):
    assert_expected_inline(without_seconds(partitions["flux"].plan.explain()), "")


def test_one_page_of_a_cross_attention(partitions):
    assert_expected_inline(without_seconds(partitions["wan"].plan.explain()), "")


@pytest.mark.parametrize("name", NAMES)
def test_stages_add_up_to_the_counts(partitions, name):
    partitioned = partitions[name]
    plan, details, counts = partitioned.plan, partitioned.plan.details, partitioned.counts
    assert plan.flops_per_rank[details.rank] == max(plan.flops_per_rank)
    assert sum(s.repeats * s.flops for s in details.stages) == max(plan.flops_per_rank)
    assert sum(s.repeats * s.flops_alone for s in details.stages) == plan.flops_total
    for kind in KINDS:
        assert sum(s.repeats * s.received[kind] for s in details.stages) == counts[details.rank].traffic.bytes[kind]
        assert sum(s.repeats * s.calls[kind] for s in details.stages) == counts[details.rank].traffic.calls[kind]
    assert sum(s.repeats * s.seconds for s in details.stages) == pytest.approx(plan.predicted_seconds["total"], rel=1e-6)
    assert {s.repeats for s in details.stages} == {1, 2}


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_has_a_runner_up_that_was_solved(partitions, name):
    partitioned = partitions[name]
    details, plan = partitioned.plan.details, partitioned.plan
    assert set(details.runners_up) == {a.node for a in plan.attention}
    for a in plan.attention:
        others = details.runners_up[a.node]
        assert others and a.strategy not in {o.strategy for o in others}
        assert [o.cost for o in others] == sorted(o.cost for o in others) and all(0 < o.cost < 1e9 for o in others)
        if a.strategy == "ulysses+ring":
            assert {o.strategy for o in others} == {"ring 4", "ulysses 4", "local"}
        else:  # the solver preferred it, collectives and all
            assert others[0].strategy == "ulysses+ring" and others[0].cost > details.cost
    assert details.cost == solve(partitioned.inference, partitioned.solution.degrees).labels.cost


def test_memory_of_a_rank_shrinks_with_the_ranks(traced):
    plans = [partition(traced["flux"], ulysses=u, ring=r).plan for u, r in ((1, 1), (2, 1), (2, 2))]
    found = [plan.details.memory for plan in plans]
    assert found[0].peak == found[0].peak_alone == found[1].peak_alone == found[2].peak_alone
    assert found[0].peak > 1.6 * found[1].peak > 2.2 * found[2].peak
    assert len({(m.parameters, m.inputs) for m in found}) == 1
    assert not plans[0].details.runners_up and "runner-up" not in plans[0].explain()


def test_nothing_is_worked_out_before_it_is_asked_for(traced):
    plan = partition(traced["wan"], ulysses=2).plan
    assert not vars(plan.inspector).keys() & {"details", "memory"}
    plan.explain()
    first = plan.details
    assert plan.details is first and plan.inspector.partitioned.traced.call.leaves[0].device.type == "meta"


def test_a_plan_without_its_inspector_is_plain_data(partitions):
    plan = partitions["wan"].plan
    sent = pickle.loads(pickle.dumps(plan))
    assert sent == plan and sent.inspector is None and sent.details is None
    assert "inspector" not in plan.to_dict() and plan.to_dict()["predicted_seconds"]["total"] > 0
    text = sent.explain()
    assert "ulysses 2 x ring 2" in text and "all_to_all" in text and "stages" not in text and "memory" not in text
    with pytest.raises(UnsupportedError, match="was loaded or sent from another process"):
        sent.why("linear")


def test_a_model_without_attention():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).to("meta")
    plan = partition(trace(model, (torch.empty(2, 8, device="meta"),), {}, dynamic=False), ulysses=2).plan
    assert isinstance(plan, Plan) and "nothing to shard" in plan.explain() and "received  nothing" in plan.explain()
    assert [s.flops for s in plan.details.stages] == [s.flops_alone for s in plan.details.stages] == [256]
