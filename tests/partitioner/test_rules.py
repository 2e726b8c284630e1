"""Every sharding that a rule claims is right; the checker itself finds planted wrong rules."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from seqpar.partitioner.infer import infer
from seqpar.partitioner.lengths import Sizes
from seqpar.partitioner.registry import RuleRegistry, registry
from seqpar.partitioner.rules import pointwise, reduce
from seqpar.tools import check_rules
from seqpar.tools.check_rules import Verdict, check_sample
from seqpar.tools.rule_samples import Sample, aliased

aten = torch.ops.aten
GROUP_BY = ("share",)
SHARES = 4


def samples():
    torch.manual_seed(0)
    return check_rules.samples_of(per_function=2, per_operator=1)


@pytest.mark.parametrize("share", range(SHARES))
def test_every_rule_is_right(share):
    verdicts = check_rules.check_all(dict(itertools.islice(samples().items(), share, None, SHARES)))
    wrong = [line for v in verdicts for line in v.wrong]
    assert not wrong, "\n".join(wrong)
    assert len(verdicts) >= 300 // SHARES and sum(v.claims for v in verdicts) >= 2000 // SHARES


def test_every_rule_has_samples_and_claims_something_on_one_of_them():
    table = samples()
    assert check_rules.unsampled(map(str, table)) == []
    idle = {check_rules.rule_name(target) for target in table} - {"create.numbered"}
    for target, calls in table.items():
        if check_rules.rule_name(target) in idle and any(map(claims_something, calls)):
            idle.remove(check_rules.rule_name(target))
    assert not idle


def claims_something(sample):
    graph, node, _ = check_rules.graph_of(sample)
    return any(True for _ in check_rules.claims(infer(graph, Sizes()), node, ranks=(2,)))


@pytest.mark.parametrize(
    ("target", "args", "wrong_rule"),
    [
        (aten.cumsum.default, (torch.arange(12.0), 0), pointwise.pointwise),
        (aten.flip.default, (torch.arange(12.0), [0]), pointwise.pointwise),
        (aten.softmax.int, (torch.arange(12.0), 0), pointwise.pointwise),
        (aten.amax.default, (torch.arange(12.0), [0]), reduce.sum_),
        (aten.mean.dim, (torch.arange(7.0), [0]), reduce.sum_),
        (aten.prod.dim_int, (torch.arange(1.0, 8.0), 0), reduce.sum_),
    ],
)
def test_wrong_rules_are_found(monkeypatch, target, args, wrong_rule):
    monkeypatch.setitem(registry._rules, target, wrong_rule)
    verdict = Verdict(str(target), "planted")
    check_sample(Sample(target, args, {}), verdict)
    assert verdict.claims and verdict.wrong


def test_one_sequence_in_two_places_of_an_operand_is_not_cut(monkeypatch):
    """A part of a diagonal is made of a part of the rows and of the columns; which of them to cut would be left open."""

    def diagonal(op):
        op.carry(0, 0, 0)
        op.carry(0, 1, 0)

    monkeypatch.setitem(registry._rules, aten.diagonal.default, diagonal)
    verdict = Verdict("aten.diagonal.default", "planted")
    check_sample(Sample(aten.diagonal.default, (torch.randn(12, 12),), {}), verdict)
    assert verdict.samples == 1 and not verdict.claims and not verdict.wrong


def test_what_is_not_claimed_is_reported(monkeypatch):
    monkeypatch.setitem(registry._rules, aten.neg.default, lambda op: None)
    verdict = Verdict("aten.neg.default", "planted")
    check_sample(Sample(aten.neg.default, (torch.randn(12, 2),), {}), verdict)
    assert verdict.claims == 0 and len(verdict.missed) == 1 and "output dim 0 follows operand 0 dim 0" in verdict.missed[0]


def test_a_tensor_passed_twice_is_tried():
    x, y = torch.randn(7, 7), torch.randn(7, 7)
    twice = list(aliased([Sample(aten.linear.default, (x, y), {})]))[1]
    assert twice.args[0] is twice.args[1] and len(twice.tensors()) == 1 and twice.key() != Sample(aten.linear.default, (x, y), {}).key()


def test_one_rule_per_operator():
    table = RuleRegistry()
    table.rule(aten.neg.default)(lambda op: None)
    with pytest.raises(ValueError, match="already has a rule"):
        table.rule(aten.neg.default)(lambda op: None)
    assert table.find(aten.abs.default) is None
    table.rule(torch.Tag.pointwise)(lambda op: None)
    assert table.find(aten.abs.default) is not None and table.find(aten.mm.default) is None


def test_command_line():
    done = subprocess.run([sys.executable, "-m", "seqpar.tools.check_rules", "--json", "--samples", "1", "unbind"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout)
    assert [v["operator"] for v in verdicts] == ["aten.unbind.int"] and verdicts[0]["claims"] > 0
