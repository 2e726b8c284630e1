"""What `explain()` says of real models: the page, and that its numbers are those of the counts."""

import pickle
import re

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


def steady(text):
    """Without what differs from run to run, and from one release of a library to the next."""
    lines = (re.sub(r"\.py:\d+$", ".py:N", line) for line in text.splitlines())
    return "\n".join(line for line in lines if not line.startswith("seconds"))


def test_one_page_of_two_kinds_of_blocks(partitions):
    assert_expected_inline(steady(partitions["flux"].plan.explain()), """\
seqpar: 4 rank(s) = ulysses 2 x ring 2
work      38.7 MFLOP in one process, 9.94 MFLOP on the busiest rank; 0.9908 of it sharded
received  85 kB per rank and call of the model (8 all_to_all 41 kB, 4 ring 41 kB, 1 all_gather 3.07 kB)
time      about 96.7 ns in one process, 261 us on the slowest rank: computing 24.8 ns, collectives 261 us exposed and 5.73 ns hidden (Hopper, NVLink; contractions only)
memory    parameters 1.93 MB and inputs 7.21 kB, whole on every rank; activations at their peak 237 kB in one process, 72.7 kB per rank
stages (each; layouts as sizes, a sharded one as size/ranks)
                                     one process      rank 0                              received       time  hands on
  x_embedder                           131 kFLOP  32.8 kFLOP                                     -  0.0819 ns  1 64/4 64
  time_text_embed                     93.2 kFLOP  93.2 kFLOP                                     -   0.233 ns  1 64
  context_embedder                    65.5 kFLOP  16.4 kFLOP                                     -   0.041 ns  1 16/4 64
  transformer_blocks.0-1 x 2           9.6 MFLOP  2.47 MFLOP  2 all_to_all 10.2 kB, 1 ring 10.2 kB    60.1 us  1 64/4 64, 1 16/4 64
  single_transformer_blocks.0-1 x 2   9.53 MFLOP   2.4 MFLOP  2 all_to_all 10.2 kB, 1 ring 10.2 kB    60.1 us  1 64/4 64, 1 16/4 64
  norm_out                            16.4 kFLOP  16.4 kFLOP                                     -   0.041 ns  1 64/4 64
  proj_out                             131 kFLOP  32.8 kFLOP                                     -  0.0819 ns  1 64/4 16
  (the model itself)                      0 FLOP      0 FLOP                  1 all_gather 3.07 kB      20 us  (16/4 + 64/4) 3, 1
collectives (per rank and call of the model)
              calls  received  on the wire
  all_to_all      8     41 kB       160 us  3.69 ns of it hidden
  ring            4     41 kB      80.3 us  2.05 ns of it hidden
  all_gather      1   3.07 kB        20 us
attention
    4 x ulysses+ring  queries [(16/4 + 64/4)] keys [(16/4 + 64/4)] 4 heads: queries, keys and values exchanged over the mesh
        about 60.1 us each; runner-up gather K/V 20.2 us, 24.6 kB (solver's price of the program +34 %), then ulysses 4 40.1 us, 15.4 kB, then ring 4 60.2 us, 30.7 kB
replicated (every rank computes all of it)
    4 x aten.linear.default          197 kFLOP  has no sequence dim  diffusers/models/normalization.py:N
    2 x aten.linear.default          65.5 kFLOP  has no sequence dim  diffusers/models/embeddings.py:N
    2 x aten.linear.default          49.2 kFLOP  has no sequence dim  diffusers/models/normalization.py:N
    2 x aten.linear.default          16.4 kFLOP  has no sequence dim  diffusers/models/embeddings.py:N
    1 x aten.linear.default          16.4 kFLOP  has no sequence dim  diffusers/models/normalization.py:N
    1 x aten.linear.default          8.19 kFLOP  has no sequence dim  diffusers/models/embeddings.py:N
    1 x aten.linear.default          3.07 kFLOP  has no sequence dim  diffusers/models/embeddings.py:N""")


def test_one_page_of_a_cross_attention(partitions):
    assert_expected_inline(steady(partitions["wan"].plan.explain()), """\
seqpar: 4 rank(s) = ulysses 2 x ring 2
work      18.3 MFLOP in one process, 5.17 MFLOP on the busiest rank; 0.9574 of it sharded
received  35.8 kB per rank and call of the model (4 all_to_all 16.4 kB, 2 ring 16.4 kB, 1 all_gather 3.07 kB)
time      about 45.9 ns in one process, 140 us on the slowest rank: computing 12.9 ns, collectives 140 us exposed and 2.46 ns hidden (Hopper, NVLink; contractions only)
memory    parameters 729 kB and inputs 6.15 kB, whole on every rank; activations at their peak 163 kB in one process, 57.6 kB per rank
stages (each; layouts as sizes, a sharded one as size/ranks)
                      one process      rank 0                              received       time  hands on
  patch_embedding       131 kFLOP  32.8 kFLOP                                     -  0.0819 ns  1 64 1 8/4 8
  condition_embedder    258 kFLOP   258 kFLOP                                     -   0.645 ns  1 16 64, 1 384
  blocks.0-1 x 2       8.91 MFLOP  2.42 MFLOP  2 all_to_all 8.19 kB, 1 ring 8.19 kB    60.1 us  1 8/4*8 64
  proj_out              131 kFLOP  32.8 kFLOP                                     -  0.0819 ns  1 8/4*8 16
  (the model itself)       0 FLOP      0 FLOP                  1 all_gather 3.07 kB      20 us  1 8/4*8 64, 1 4 1 8/4*2 16
collectives (per rank and call of the model)
              calls  received  on the wire
  all_to_all      4   16.4 kB      80.1 us  1.8 ns of it hidden
  ring            2   16.4 kB      40.1 us  0.655 ns of it hidden
  all_gather      1   3.07 kB        20 us
attention
    2 x ulysses+ring  queries [8/4*8] keys [8/4*8] 4 heads: queries, keys and values exchanged over the mesh
        about 60.1 us each; runner-up gather K/V 20.2 us, 24.6 kB (solver's price of the program +11 %), then ulysses 4 40.1 us, 12.3 kB, then ring 4 60.2 us, 24.6 kB
    2 x local         queries [8/4*8] keys [16] 4 heads: keys are whole on every rank: nothing moves
        about 0.164 ns each; runner-up ulysses+ring 60 us, 7.17 kB (solver's price of the program +247 %)
replicated (every rank computes all of it)
    4 x aten.linear.default          524 kFLOP  computing it everywhere costs less than communicating  diffusers/models/transformers/transformer_wan.py:N
    1 x aten.linear.default          131 kFLOP  computing it everywhere costs less than communicating  diffusers/models/embeddings.py:N
    1 x aten.linear.default          65.5 kFLOP  computing it everywhere costs less than communicating  diffusers/models/embeddings.py:N
    1 x aten.linear.default          49.2 kFLOP  has no sequence dim  diffusers/models/transformers/transformer_wan.py:N
    1 x aten.linear.default          8.19 kFLOP  has no sequence dim  diffusers/models/embeddings.py:N
    1 x aten.linear.default          4.1 kFLOP  has no sequence dim  diffusers/models/embeddings.py:N""")


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
def test_every_attention_has_a_runner_up(partitions, name):
    partitioned = partitions[name]
    details, plan = partitioned.plan.details, partitioned.plan
    assert set(details.runners_up) == set(details.attention_seconds) == {a.node for a in plan.attention}
    for a in plan.attention:
        others = details.runners_up[a.node]
        assert others and a.strategy not in {o.strategy for o in others} and 0 < details.attention_seconds[a.node] < 1e-3
        if a.strategy == "ulysses+ring":
            assert {o.strategy for o in others} == {"ring 4", "ulysses 4", "gather K/V"}
        else:
            assert [o.strategy for o in others] == ["ulysses+ring"]
        assert all(o.cost is None or o.cost > details.cost for o in others)  # where the solver decided, it took the cheaper one
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
