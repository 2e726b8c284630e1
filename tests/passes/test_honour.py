"""What becomes of each entry of a plan: noted, or refused; never dropped."""

import pytest
import torch
from torch import nn

import seqpar
from seqpar.compile import graph_fingerprint, traced_with
from seqpar.errors import PlanError
from seqpar.partitioner.labels import Labels
from seqpar.passes.boundary import detach
from seqpar.passes.honour import check_plan, honoured
from seqpar.passes.pipeline import partition
from seqpar.sp_plan import SequenceParallelInput as Input
from seqpar.sp_plan import SequenceParallelOutput as Output
from seqpar.sp_plan import declarations
from seqpar.verification import verify_traced


class Model(nn.Module):
    """Attention written out; one module is never called, one input is never read."""

    def __init__(self):
        super().__init__()
        self.to_q, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, text, unused=None, absent=None):
        h = torch.cat([text, x], 1)
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (self.to_q(h), h, h * 2))
        return (h + ((q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))[:, text.shape[1] :]


PLAN = {
    "": {"x": Input(1, auto_pad=True), "text": Input(1), "unused": Input(1), "absent": Input(1)},
    "idle": Output(1),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture(scope="module")
def inputs():
    return {"x": torch.randn(2, 9, 8), "text": torch.randn(2, 3, 8), "unused": torch.randn(2, 9)}


@pytest.fixture(scope="module")
def traced(model, inputs):
    return traced_with(Ends(model), (), inputs, declarations(Ends(model), {**{f"model.{k}".rstrip("."): v for k, v in PLAN.items()}, "": Output(1)}), False)


class Ends(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, text, unused=None):
        return self.model(x, text, unused)


def test_notes(traced):
    report = verify_traced(traced, ulysses=2, ring=2)
    assert report.ok and report.plan.attention[0].strategy == "ulysses+ring"
    assert report.plan.notes == (
        "plan['model']['absent']: input 'absent' of model is None or left out in this call",
        "plan['model.idle']: model.idle is not called with these inputs",
        "plan['model']['unused']: input 'unused' of model is read by nothing in the program",
        "plan['model']['x']: split in dim 1, 9/4 positions",
        "plan['model']['x']: auto_pad: nothing is padded, the parts have unequal lengths instead",
        "plan['model']['text']: kept whole: 3 positions, fewer than 4 ranks",
        "plan['']: gathered in dim 1",
    )
    assert report.plan.to_dict()["notes"] == list(report.plan.notes) and "declared\n  plan['model']['absent']" in report.plan.explain()


def test_one_rank(traced):
    partitioned = partition(traced)
    assert "plan['model']['x']: one rank, nothing to split" in partitioned.plan.notes
    assert not any("boundary" in str(node.target) for node in partitioned.program(0).graph.nodes)


def test_labels_that_forget_a_pin_are_refused(traced):
    partitioned = partition(traced, ulysses=2)
    partitioned.solution.labels = Labels()
    with pytest.raises(PlanError, match=r"plan\['model'\]\['x'\] splits input 'x' of model, and the solver left it whole"):
        honoured(partitioned.traced, partitioned.inference, partitioned.solution)


def test_a_pin_that_a_rewrite_swallowed_is_refused(traced):
    partitioned = partition(traced, ulysses=2)
    with pytest.raises(PlanError, match=r"plan\['model'\]\['x'\] pins input 'x' of model, which lies inside an attention"):
        check_plan(traced, detach(traced.gm, pins=True)[0], partitioned.inference)


def test_a_pin_without_any_sequence_is_refused():
    with pytest.raises(PlanError, match=r"splits dim 1 of input 'input' of the model, which is not the sequence\n.*none of its dims is a sequence"):
        seqpar.plan(nn.LayerNorm(8), (torch.randn(2, 9, 8),), ulysses=2, sp_plan={"": {"input": Input(1)}})


def test_fingerprints_tell_plans_apart_but_not_folders(traced, model, inputs):
    """Ranks on machines with other folders run the same program; ranks with another plan do not."""
    other = traced_with(Ends(model), (), inputs, (), False)
    moved = traced_with(Ends(model), (), inputs, declarations(Ends(model), {"model": {"x": Input(1)}, "": Output(1)}), False)
    assert len({graph_fingerprint(t) for t in (traced, other, moved)}) == 3
    for node in traced.gm.graph.nodes:
        if "boundary" in str(node.target):
            assert __file__ in node.args[1]
            moved_key = node.args[1].replace(__file__, "/elsewhere.py")
            before = graph_fingerprint(traced), partition(traced, ulysses=2).fingerprint
            node.args = (node.args[0], moved_key, *node.args[2:])
            assert (graph_fingerprint(traced), partition(traced, ulysses=2).fingerprint) == before
            return

