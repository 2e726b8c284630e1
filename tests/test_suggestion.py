"""`seqpar.suggest`: the table over all splits, what is refused, what does not fit, and the advice."""

import json
import re

import pytest
import torch

import seqpar
from seqpar.errors import MeshError
from seqpar.models import registry
from seqpar.partitioner.cost import Machine
from seqpar.suggestion import splits

SLOW_WIRE = Machine(flops_per_s=1e12, bytes_per_s=1e3, latency_s=1.0, name="slow wire")
FAST_WIRE = Machine(flops_per_s=1e9, bytes_per_s=1e12, latency_s=1e-9, name="fast wire")
NO_MEMORY = Machine(flops_per_s=1e12, bytes_per_s=1e3, latency_s=1.0, memory_bytes=1e6, name="little memory")


@pytest.fixture(scope="module")
def case():
    family = registry.get("pattern-standard")
    config = family.tiny_config(heads=2, layers=1)
    return family.build(config, device="meta"), family.grid_inputs(config, rows=16, columns=16, device="meta")


def test_all_splits_that_divide_the_world():
    assert list(splits(1)) == [(1, 1)]
    assert list(splits(6)) == [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (6, 1), (3, 2), (2, 3), (1, 6)]


def test_a_fast_wire_is_used(case):
    found = seqpar.suggest(*case, 4, hardware=FAST_WIRE)
    assert [(r.ulysses, r.ring) for r in found.rows] == list(splits(4))
    assert found.best.ranks == 4 and found.best.seconds == pytest.approx(min(r.seconds for r in found.rows if not r.refused), rel=0.02)
    alone = found.rows[0]
    assert not [r for r in found.rows if r.refused]  # more ranks than heads share them
    assert 3 < alone.seconds / found.best.seconds < 4 and alone.received == alone.calls == 0 and found.best.memory < alone.memory
    plan = seqpar.plan(*case, ulysses=found.best.ulysses, ring=found.best.ring)
    assert found.best.received == sum(plan.comm_bytes_per_rank.values()) and found.best.memory == plan.details.memory.total
    assert all(r.refused or r.exposed + r.hidden == pytest.approx(r.calls * 1e-9 + r.received / 1e12) for r in found.rows) and found.best.hidden > 0
    rounded = seqpar.suggest(*case, 4, hardware=FAST_WIRE, comm_dtype=torch.bfloat16)
    assert any(few.received < row.received for few, row in zip(rounded.rows, found.rows, strict=True) if not row.refused), (rounded, found)
    text = str(found)
    assert re.search(r"exposed +hidden +received", text) and text.startswith("4 ranks, fast wire") and "stay on one device" in text
    assert text.endswith(f"recommended: {found.best.name}") and text.count("recommended") == 2
    again = json.loads(json.dumps(found.to_dict()))
    assert again["best"]["ring"] == found.best.ring and len(again["rows"]) == len(found.rows)


def test_a_slow_wire_is_not(case):
    assert seqpar.suggest(*case, 2, hardware=SLOW_WIRE).best.name == "stay on one device"


def test_a_device_with_little_memory_needs_company(case):
    alone, two, _ = seqpar.suggest(*case, 2, hardware=SLOW_WIRE).rows
    between = Machine(**{**vars(NO_MEMORY), "memory_bytes": (alone.memory + two.memory) / 2})
    found = seqpar.suggest(*case, 2, hardware=between)
    assert not found.rows[0].fits and "does not fit" in str(found) and found.best.ranks == 2 and found.best.fits
    none = seqpar.suggest(*case, 2, hardware=Machine(**{**vars(NO_MEMORY), "memory_bytes": 1.0}))
    assert none.best.memory == min(r.memory for r in none.rows) and "it does not fit into the memory either" in str(none)


def test_wrong_requests_are_told(case):
    for world_size in (0, -1, 2.0, True):
        with pytest.raises(MeshError, match="world_size must be an integer >= 1"):
            seqpar.suggest(*case, world_size)
    with pytest.raises(MeshError, match="no hardware profile 'abacus'"):
        seqpar.suggest(*case, 2, hardware="abacus")
    with pytest.raises(seqpar.SeqparError):
        seqpar.suggest(torch.nn.Linear(2, 2), "text", 2)
