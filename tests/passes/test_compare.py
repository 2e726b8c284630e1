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
    assert_expected_inline(str(found), """\
                             ulysses 4 x ring 1  ulysses 2 x ring 2
  work of one process                15.2 MFLOP          15.2 MFLOP
  work of the busiest rank           3.81 MFLOP          3.81 MFLOP
  sharded share of the work              0.9995              0.9995
  received per rank                     30.7 kB             38.9 kB  +27 %
    all_to_all                          24.6 kB             16.4 kB  -33 %
    ring                                    0 B             16.4 kB
    all_gather                          6.14 kB             6.14 kB
  collective calls                            5                   7  +40 %
  predicted time                         100 us              140 us  +40 %
  activations at their peak             37.9 kB             37.9 kB
  replicated operators                        2                   2
  attention: 2 x ulysses | 2 x ulysses+ring""")
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
