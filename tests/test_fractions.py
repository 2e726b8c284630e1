"""How much of the work is sharded and what is communicated, for every family, counted from the emitted programs on meta tensors.

32 x 32 image tokens, 32 text tokens, 2 blocks. After a deliberate change, print the table anew: `python tests/test_fractions.py`.
"""

import functools

import pytest
import torch

from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.passes.pipeline import partition
from seqpar.passes.plan import Plan
from seqpar.passes.trace import Traced, trace
from seqpar.verification import verify_traced

MESHES = {"u2": (2, 1), "r2": (1, 2), "u4": (4, 1), "r4": (1, 4), "u2r2": (2, 2)}
GROUP_BY = ("name",)
SDPA = torch.ops.aten.scaled_dot_product_attention.default

# Per family and mesh: kind of collective -> (bytes the busiest rank receives, calls).
TRAFFIC = {
    "flux": {
        "u2": {"all_to_all": (1081344, 8), "all_gather": (32768, 1)},
        "r2": {"ring": (1081344, 4), "all_gather": (32768, 1)},
        "u2r2": {"all_to_all": (540672, 8), "ring": (540672, 4), "all_gather": (49152, 1)},
    },
    "qwen-image": {
        "u2": {"all_to_all": (540672, 4), "all_gather": (32768, 1)},
        "r2": {"ring": (540672, 2), "all_gather": (32768, 1)},
        "u2r2": {"all_to_all": (270336, 4), "ring": (270336, 2), "all_gather": (49152, 1)},
    },
    "wan": {
        "u2": {"all_to_all": (524288, 4), "all_gather": (32768, 1)},
        "r2": {"ring": (524288, 2), "all_gather": (32768, 1)},
        "u2r2": {"all_to_all": (262144, 4), "ring": (262144, 2), "all_gather": (49152, 1)},
    },
    "wan-ti2v": {
        "u2": {"all_to_all": (524288, 4), "all_gather": (32768, 1)},
        "r2": {"ring": (524288, 2), "all_gather": (32768, 1)},
        "u2r2": {"all_to_all": (262144, 4), "ring": (262144, 2), "all_gather": (49152, 1)},
    },
    "z-image": {
        "u2": {"all_to_all": (811008, 8), "all_gather": (32768, 1)},
        "r2": {"ring": (811008, 4), "all_gather": (32768, 1)},
        "u2r2": {"all_to_all": (405504, 8), "ring": (405504, 4), "all_gather": (49152, 1)},
    },
    "longcat-image": {
        "u2": {"all_to_all": (1081344, 8), "all_gather": (131072, 1)},
        "r2": {"ring": (1081344, 4), "all_gather": (131072, 1)},
        "u2r2": {"all_to_all": (540672, 8), "ring": (540672, 4), "all_gather": (196608, 1)},
    },
    "sd3": {
        "u2": {"all_to_all": (802816, 6), "all_gather": (32768, 1)},
        "r2": {"ring": (802816, 3), "all_gather": (32768, 1)},
        "u2r2": {"all_to_all": (401408, 6), "ring": (401408, 3), "all_gather": (49152, 1)},
    },
    "ltx-video": {
        "u2": {"all_to_all": (524288, 4), "all_gather": (16384, 1)},
        "r2": {"ring": (524288, 2), "all_gather": (16384, 1)},
        "u2r2": {"all_to_all": (262144, 4), "ring": (262144, 2), "all_gather": (24576, 1)},
    },
    "hunyuan-video": {
        "u2": {"all_to_all": (1089536, 10), "all_gather": (32768, 1)},
        "r2": {"ring": (1089536, 5), "all_gather": (32768, 1)},
        "u2r2": {"all_to_all": (544768, 10), "ring": (544768, 5), "all_gather": (49152, 1)},
    },
    "bagel": {
        "u2": {"all_to_all": (393728, 4), "all_gather": (32768, 1)},
        "r2": {"ring": (270336, 2), "all_gather": (33792, 3)},
        "u2r2": {"all_to_all": (197120, 4), "ring": (131072, 2), "all_gather": (52224, 3)},
    },
    "pattern-standard": {
        "u2": {"all_to_all": (524288, 4), "all_gather": (65536, 1)},
        "r2": {"ring": (524288, 2), "all_gather": (65536, 1)},
        "u2r2": {"all_to_all": (262144, 4), "ring": (262144, 2), "all_gather": (98304, 1)},
    },
    "pattern-rope": {
        "u2": {"all_to_all": (524288, 4), "all_gather": (16384, 1)},
        "r2": {"ring": (524288, 2), "all_gather": (16384, 1)},
        "u2r2": {"all_to_all": (262144, 4), "ring": (262144, 2), "all_gather": (24576, 1)},
    },
    "pattern-unified": {
        "u2": {"all_to_all": (540672, 4), "all_gather": (16384, 1)},
        "r2": {"ring": (540672, 2), "all_gather": (16384, 1)},
        "u2r2": {"all_to_all": (270336, 4), "ring": (270336, 2), "all_gather": (24576, 1)},
    },
}


@functools.lru_cache(maxsize=1)
def traced(name: str, heads: int) -> Traced:
    family = registry.get(name)
    config = family.tiny_config(heads)
    inputs = family.grid_inputs(config, rows=32, columns=32, text_len=32, device="meta")
    return trace(family.build(config, device="meta"), (), inputs, dynamic=False)


def plan_of(found: Traced, mesh: str) -> Plan:
    ulysses, ring = MESHES[mesh]
    return partition(found, ulysses=ulysses, ring=ring).plan


def traffic(plan: Plan) -> dict[str, tuple[int, int]]:
    return {kind: (plan.comm_bytes_per_rank[kind], calls) for kind, calls in plan.comm_calls.items() if calls}


def permitted_fraction(found: Traced, plan: Plan, heads: int) -> float:
    """sharded_flop_fraction if all is divided evenly but attention, of which the busiest rank has ceil(heads / ulysses) heads."""
    attention = 0
    for node in found.gm.graph.nodes:
        if node.target is SDPA:
            (batch, count, queries, width), keys = node.args[0].meta["val"].shape, node.args[1].meta["val"].shape[2]
            attention += 4 * batch * count * queries * keys * width
    share = -(-heads // plan.ulysses) / heads / plan.ring
    busiest = (plan.flops_total - attention) / plan.world_size + attention * share
    return (plan.flops_total - busiest) / (plan.flops_total * (1 - 1 / plan.world_size))


@pytest.mark.parametrize("name", registry.names())
def test_nearly_all_work_is_sharded_and_traffic_is_pinned(name):
    plans = {mesh: plan_of(traced(name, 4), mesh) for mesh in MESHES}
    assert {mesh: plan.sharded_flop_fraction for mesh, plan in plans.items() if plan.sharded_flop_fraction < 0.98} == {}
    assert {mesh: traffic(plans[mesh]) for mesh in TRAFFIC[name]} == TRAFFIC[name]
    for mesh, plan in plans.items():  # the list explains what is not sharded (but for two replicated queries of BAGEL in a ring)
        listed = sum(op.flops for op in plan.replicated_ops)
        assert max(plan.flops_per_rank) == pytest.approx(listed + (plan.flops_total - listed) / plan.world_size, rel=5e-3), mesh


@pytest.mark.parametrize("name", ["flux", "qwen-image", "wan", "z-image", "sd3", "bagel", "pattern-rope"])
def test_heads_that_cannot_be_divided_cost_no_more_than_they_must(name):
    found = traced(name, 5)
    for mesh in ("u2", "u4", "u2r2"):
        plan = plan_of(found, mesh)
        permitted = permitted_fraction(found, plan, 5)
        assert plan.sharded_flop_fraction >= permitted - 0.02, (mesh, plan.sharded_flop_fraction, permitted)
        assert plan.sharded_flop_fraction <= 1.0
    # A ring does not care how many heads there are.
    assert plan_of(found, "r4").sharded_flop_fraction >= 0.98


@pytest.mark.parametrize(("columns", "text_len"), [(1, 1), (3, 2), (5, 1), (2, 9), (4, 3)])
def test_short_sequences_are_replicated_and_explained(columns, text_len):
    family = registry.get("flux")
    config = family.tiny_config(4, 1)
    inputs = family.grid_inputs(config, rows=1, columns=columns, text_len=text_len)
    found = trace(randomise(family.build(config)), (), inputs, dynamic=False)
    for mesh in ("u4", "r4", "u2r2"):
        check_short(found, columns, text_len, *MESHES[mesh])


def check_short(found, columns, text_len, ulysses, ring):
    report = verify_traced(found, ulysses=ulysses, ring=ring)
    assert report.ok, str(report)
    plan = report.plan
    if max(columns, text_len) < 4:
        assert {a.strategy for a in plan.attention} == {"replicated"}
        assert all(f"{max(columns, text_len)} positions, fewer than 4 ranks" in a.why for a in plan.attention)
        assert plan.sharded_flop_fraction == 0.0 and not traffic(plan)
    else:
        assert "replicated" not in {a.strategy for a in plan.attention} and plan.sharded_flop_fraction > 0
    short = [op for op in plan.replicated_ops if op.reason == "its sequence is shorter than 4 ranks"]
    assert bool(short) == (min(columns, text_len) < 4)
    assert all(op.flops > 0 and op.source and op.op.startswith("aten.") for op in short)
    assert "shorter than 4 ranks" in plan.explain() or not short


if __name__ == "__main__":
    for name in registry.names():
        print(f'    "{name}": {{')
        for mesh in ("u2", "r2", "u2r2"):
            print(f'        "{mesh}": {traffic(plan_of(traced(name, 4), mesh))},'.replace("'", '"'))
        print("    },")
