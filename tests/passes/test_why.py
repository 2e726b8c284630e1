"""Why a value is laid out as it is: sharded, whole, an input, a source line, and what is not there."""

import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.errors import UnsupportedError
from seqpar.partitioner.alternatives import force, problem_of
from seqpar.partitioner.label_problem import LabelProblem
from seqpar.partitioner.mincut import CutProblem
from seqpar.passes.inspector import Inspector
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace

HERE = Path(__file__).name


def line_of(text):
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith(f"# {text}"))


class Model(nn.Module):
    """Attention over 16 tokens, a scan along them, and a vector per picture."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.embed = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, time):
        shift = self.embed(time)  # vector
        q, k, v = (t.unflatten(-1, (4, 2)).transpose(1, 2) for t in self.qkv(x + shift[:, None]).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # attention
        y = self.out(y)
        return y + y.cumsum(1)  # scan


def rotate(x):
    return torch.stack((-x[..., 1], x[..., 0]), -1)  # helper


class Helped(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, rotate(x), x)  # caller


@pytest.fixture(scope="module")
def partitioned():
    torch.manual_seed(0)
    return partition(trace(Model().eval(), (torch.randn(1, 16, 8), torch.randn(1, 8)), {}, dynamic=False), ulysses=2)


def only(partitioned, query):
    (answer,) = partitioned.plan.why(query).answers
    return answer


def test_a_sharded_value_and_the_price_of_making_it_whole(partitioned):
    answer = only(partitioned, "qkv")
    assert answer.sharded and answer.layout == "1 16/2 24" and answer.op == "aten.linear.default" and answer.stage == "qkv"
    assert any(re.search(rf"dim 1, 16/2, is the sequence of scaled_dot_product_attention \(.*{HERE}:{line_of('attention')}\)$", r) for r in answer.reasons)
    work = 2 * 16 * 8 * 24
    assert f"{work / 2 / 1000:.3g} kFLOP sharded, {work / 1000:.3g} kFLOP whole" in answer.reasons[0]
    # Whole, its inputs are computed whole as well (they are free) and what reads it takes its part for nothing: half the work more.
    assert answer.opposite_cost >= work / 2 * 0.99 and "forced to be whole" in answer.reasons[1]


def test_the_forced_price_is_that_of_a_solution_with_that_label(partitioned):
    inference, solution = partitioned.inference, partitioned.solution
    problem = problem_of(inference, solution)
    found = [forced for node in inference.relations if (forced := force(problem, solution, node)) is not None]
    assert len(found) > 10 and all(forced.cost >= solution.labels.cost * (1 - 1e-6) for forced in found)
    cost, _ = problem.problem.solve()  # left as it was
    assert cost == solution.labels.cost


def test_questions_share_the_solver_s_problem_and_cut_once_per_value_with_a_choice(partitioned, monkeypatch):
    """Full-size models have thousands of values: solving the labels again for a question took tens of seconds."""
    counts = Counter()
    for owner, name in ((LabelProblem, "build"), (CutProblem, "solve")):
        original = getattr(owner, name)

        def counted(self, original=original, name=name):
            counts[name] += 1
            return original(self)

        monkeypatch.setattr(owner, name, counted)
    inspector = Inspector(partitioned)
    answers = [answer for query in ("qkv", "embed", "out", "x", "cumsum", f"{HERE}:{line_of('attention')}") for answer in inspector.why(query).answers]
    chosen = [answer for answer in answers if answer.opposite_cost is not None]
    assert 0 < len(chosen) < len(answers) and counts == {"build": 1, "solve": len(chosen)}


def test_a_replicated_value(partitioned):
    answer = only(partitioned, "embed")
    assert not answer.sharded and answer.layout == "1 8" and answer.opposite_cost is None
    assert answer.reasons == ("whole on every rank: has no sequence dim", "rule of aten.linear.default: linear layer over this dim")


def test_a_value_that_its_rule_makes_whole(partitioned):
    answer = next(a for a in partitioned.plan.why(f"{HERE}:{line_of('scan')}").answers if "cumsum" in a.op)
    assert not answer.sharded and answer.layout == "1 16 8" and answer.opposite_cost is None
    assert "whole on every rank" in answer.reasons[0] and any("cumsum" in r for r in answer.reasons)


def test_a_source_line_and_an_emitted_name(partitioned):
    found = partitioned.plan.why(f"{HERE}:{line_of('attention')}")
    assert {a.op.split(".")[1] for a in found.answers} >= {"scaled_dot_product_attention"} and not found.more
    assert all(a.source.endswith(f"{HERE}:{line_of('attention')}") for a in found.answers)
    emitted = next(n for n in partitioned.program(0).graph.nodes if "linear" in n.name and n.meta["seqpar_source"])
    assert only(partitioned, emitted.name).names == (emitted.meta["seqpar_source"],)
    assert found.to_dict()["answers"][0]["names"] and str(found).startswith(found.answers[0].names[0])


def test_an_input(partitioned):
    answer = only(partitioned, "x")
    assert answer.op == "placeholder" and not answer.sharded and "given whole" in answer.reasons[0] and "dim 1, 16, is the sequence" in answer.reasons[1]


def test_attention_around_a_ring_cannot_be_whole():
    plan = partition(trace(Model().eval(), (torch.randn(1, 16, 8), torch.randn(1, 8)), {}, dynamic=False), ring=2).plan
    answer = plan.why("scaled_dot_product_attention").answers[0]
    assert answer.opposite_cost == math.inf and "it cannot be whole" in answer.reasons[1]


def test_a_name_that_is_also_an_operator_is_both(partitioned):
    found = partitioned.plan.why("linear").answers
    assert found[0].names == ("linear",) and {answer.module for answer in found} == {"embed", "qkv", "out"}


def test_a_line_of_a_function_that_forward_calls():
    plan = partition(trace(Helped(), (torch.randn(1, 4, 16, 2),), {}, dynamic=False), ulysses=2).plan
    helped = {name for answer in plan.why(f"{HERE}:{line_of('helper')}").answers for name in answer.names}
    calling = [answer for answer in plan.why(f"{HERE}:{line_of('caller')}").answers]
    assert {"stack", "neg"} <= helped and all(answer.source.endswith(f"{HERE}:{line_of('caller')}") for answer in calling)
    assert helped < {name for answer in calling for name in answer.names}
    (where,) = (a.where for a in calling if a.names == ("stack",))
    assert where.endswith(f"{HERE}:{line_of('caller')} > {HERE}:{line_of('helper')}")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("qkvv", "no value, module, operator or source line of this plan matches 'qkvv'"),
        ("linear_99", "the nearest names are linear"),
        (f"{HERE}:1", "line 1 of .* computes no value of this plan; the nearest lines that do: "),
        ("elsewhere.py:3", f"no value of this plan comes from 'elsewhere.py:3'; values come from {HERE}"),
        ("", "no value"),
    ],
)
def test_what_is_not_there(partitioned, query, message):
    with pytest.raises(UnsupportedError, match=message):
        partitioned.plan.why(query)
