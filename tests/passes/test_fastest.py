"""At real rates the program that is predicted to be fastest is taken, not the one whose price is lowest."""

from dataclasses import replace

import pytest

from seqpar.models import registry
from seqpar.partitioner.machines import rates_of
from seqpar.passes.fastest import WHY, fastest, seconds_of
from seqpar.passes.options import Options
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace


@pytest.fixture(scope="module")
def traced():
    """Two blocks of a published model, one trace each."""
    known = {}

    def of(name):
        if name not in known:
            family = registry.get(name)
            settings = family.with_layers(family.full, 2)
            known[name] = trace(family.build(settings, device="meta"), (), family.native_inputs(settings, device="meta"), dynamic=False)
        return known[name]

    return of


@pytest.mark.parametrize(
    ("name", "hardware", "cheapest", "taken", "gain"),
    [
        ("qwen-image", "H100", "gather K/V", "ulysses", 0.985),  # turns hide what prices say is dear
        ("wan", "RTX 4090", "gather input", "ulysses", 0.985),
        ("flux", "H100", "gather K/V", "gather K/V", 1.0),  # its gather hides behind the MLP beside the attention
        ("flux", "RTX 4090", "gather input", "gather input", 1.0),
    ],
)
def test_what_hides_more_is_taken(traced, name, hardware, cheapest, taken, gain):
    found = {replay: partition(traced(name), ulysses=2, machine=rates_of(hardware), options=Options(replay=replay)).plan for replay in (False, True)}
    heaviest = {replay: next(a for a in reversed(plan.attention) if a.strategy != "local") for replay, plan in found.items()}
    assert heaviest[False].strategy == cheapest and heaviest[True].strategy.startswith(taken)
    assert found[True].predicted_seconds["total"] <= gain * found[False].predicted_seconds["total"]
    assert (WHY in heaviest[True].why) == (WHY in found[True].explain()) == (taken != cheapest)
    assert "replay" in found[True].seconds and "replay" not in found[False].seconds


def test_the_others_are_not_faster(traced):
    """All that the solver tried, by the same clock; the one that was taken keeps none of them."""
    tried = []
    partitioned = partition(traced("qwen-image"), ulysses=2, machine=rates_of("A100"), options=Options(replay=False))

    def programs(solution):
        tried.append(replace_solution(partitioned, solution))
        return tried[-1]

    best = fastest(programs, partitioned.solution)
    assert len(tried) > 1 and min(tried, key=seconds_of) is best and not best.solution.close


def replace_solution(partitioned, solution):
    return type(partitioned)(partitioned.traced, partitioned.inference, solution, {}, machine=partitioned.machine)


def test_without_rates_nothing_is_compared(traced):
    found = partition(traced("qwen-image"), ulysses=2)
    assert not found.solution.close and "replay" not in found.seconds


def test_close_solutions_cost_little_more(traced):
    found = partition(traced("flux"), ulysses=2, machine=rates_of("L40"), options=Options(replay=False)).solution
    assert found.close and all(found.labels.cost <= other.labels.cost <= 1.25 * found.labels.cost for other in found.close)
    assert replace(found, close=()).labels is found.labels
