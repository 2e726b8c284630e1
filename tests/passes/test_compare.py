"""Two plans side by side."""

import dataclasses

import pytest
from expecttest import assert_expected_inline

from seqpar.models import registry
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace


@pytest.fixture(scope="module")
def plans():
    family = registry.get("pattern-standard")
    config = family.tiny_config(heads=4, layers=2)
    traced = trace(family.build(config, device="meta"), (), family.grid_inputs(config, rows=8, columns=8, device="meta"), dynamic=False)
    return partition(traced, ulysses=4).plan, partition(traced, ulysses=2, ring=2).plan


def test_two_meshes(plans):
    found = plans[0].compare(plans[1])
    assert_expected_inline(str(found), "")
    rows = {row.name.strip(): row for row in found.rows}
    for row, plan in ((row, plan) for row in (rows["received per rank"],) for plan in plans):
        assert sum(plan.comm_bytes_per_rank.values()) in (row.left, row.right)
    assert rows["ring"].left == 0 and rows["ring"].right == plans[1].comm_bytes_per_rank["ring"]
    assert found.to_dict()["rows"][0]["left"] == plans[0].flops_total


def test_a_plan_that_was_sent_has_no_memory(plans):
    sent = dataclasses.replace(plans[1], inspector=None)
    row = next(r for r in plans[0].compare(sent).rows if r.name.startswith("activations"))
    assert row.left > 0 and row.right is None and "?" in str(plans[0].compare(sent))


def test_equal_plans_differ_in_nothing(plans):
    found = plans[0].compare(plans[0])
    assert not found.differences and all(row.left == row.right for row in found.rows)
