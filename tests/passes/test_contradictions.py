"""Plans that contradict the graph: each error names the tensor, the dim and what the graph says. Plans that hooks execute correctly pass."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqpar
from seqpar.compile import traced_with
from seqpar.errors import PlanError
from seqpar.sp_plan import SequenceParallelInput as Input
from seqpar.sp_plan import SequenceParallelOutput as Output
from seqpar.sp_plan import SequenceParallelPartialInput as Partial
from seqpar.sp_plan import declarations
from seqpar.verification import verify_traced

TEXT, IMAGE, BATCH = 4, 9, 2


class JointBlock(nn.Module):
    """Text and image attend to each other, with rotary tables for both, text first."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8)

    def forward(self, hidden_states, text, tables):
        unified = torch.cat([text, hidden_states], dim=1)
        q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (self.to_q(unified), unified, unified * 2))
        q, k = (x * tables[0] + x.flip(-1) * tables[1] for x in (q, k))
        unified = unified + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return unified[:, text.shape[1] :], unified[:, : text.shape[1]]


class Joint(nn.Module):
    def __init__(self):
        super().__init__()
        self.rope = RotaryTables(4)
        self.blocks = nn.ModuleList(JointBlock() for _ in range(2))
        self.norm_out, self.proj_out = nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, hidden_states, text, ids, text_len=None, pooled=None):
        h, c, tables = hidden_states, text, self.rope(ids)
        for block in self.blocks:
            h, c = block(h, c, tables)
        out = self.proj_out(self.norm_out(h))
        return out.unflatten(1, (3, 3)).permute(0, 3, 1, 2)  # a picture again, as models return


class RotaryTables(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.register_buffer("speed", torch.rand(width))

    def forward(self, ids):
        angles = ids[:, None] * self.speed
        return angles.cos(), angles.sin()


ROPE = {0: Partial(0, "text", 2, True), 1: Partial(0, "text", 2, True)}
GOOD = {"rope": ROPE, "blocks.0": {"hidden_states": Input(1, 3)}, "proj_out": Output(1, 3)}
SPLIT_TEXT = {
    "rope": {0: Partial(0, 0, 2, True), 1: Partial(0, 0, 2, True)},
    "blocks.0": {"hidden_states": Input(1, 3), "text": Input(1, 3)},
    "proj_out": Output(1, 3),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Joint()


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    return {"hidden_states": torch.randn(BATCH, IMAGE, 8), "text": torch.randn(BATCH, TEXT, 8), "ids": torch.arange(TEXT + IMAGE) * 1.0}


@pytest.mark.parametrize("plan", [GOOD, SPLIT_TEXT], ids=["text whole", "text split"])
def test_a_correct_plan_is_honoured(model, inputs, plan):
    traced = traced_with(model, (), inputs, declarations(model, plan), False)
    expected = [model(**inputs).detach()]
    assert expected[0].std() > 0.1
    for ulysses, ring in ((2, 1), (1, 2), (2, 2)):
        report = verify_traced(traced, ulysses=ulysses, ring=ring, expected=expected)
        ranks = ulysses * ring
        assert report.ok and report.max_rel_err < 1e-6
        assert f"plan['blocks.0']['hidden_states']: split in dim 1, 9/{ranks} positions" in report.plan.notes
        assert (f"plan['blocks.0']['text']: split in dim 1, 4/{ranks} positions" in report.plan.notes) == (plan is SPLIT_TEXT)
        assert "plan['proj_out']: gathered in dim 1" in report.plan.notes and "plan['proj_out']" in report.plan.explain()


@pytest.mark.parametrize("source", ["text", TEXT, "text_len"])
def test_the_length_of_the_text(model, inputs, source):
    """A parameter of the model that is a tensor [batch, text, …] or an integer, or a number; with symbolic sizes too."""
    rope = {i: Partial(0, source, 2, True) for i in (0, 1)}
    report = seqpar.verify(model, {**inputs, "text_len": TEXT}, ulysses=2, dynamic=source == "text", sp_plan={**GOOD, "rope": rope})
    assert report.ok and "plan['rope'][1]: split in dim 0, 9/2 positions, the first 4 whole" in report.plan.notes


# what: changes of GOOD -> what the error says
WRONG = {
    "batch": ({"blocks.0": {"hidden_states": Input(0, 3)}}, ["splits dim 0 of input 'hidden_states' of blocks.0", "not the sequence", "(2, 9, 8), its sequence is dim 1", "SequenceParallelInput(split_dim=1, expected_dims=3)"]),
    "features": ({"blocks.0": {"hidden_states": Input(-1)}}, ["splits dim 2 of input 'hidden_states' of blocks.0", "(2, 9, 8), its sequence is dim 1"]),
    "frequencies": ({"rope": {**ROPE, 1: Partial(1, "text", 2, True)}}, ["plan['rope'][1] splits dim 1 of output 1 of rope", "(4 + 9, 4), its sequence is dim 0", "PartialInput(split_dim=0"]),
    "number of dims": ({"blocks.0": {"hidden_states": Input(1, 4)}}, ["expected_dims=4, but input 'hidden_states' of blocks.0 has 3 dims", "(2, 9, 8), its sequence is dim 1"]),
    "rope left whole": ({"rope": {}}, ["an output of rope is left whole", "plan['blocks.0']['hidden_states'] splits input 'hidden_states' of blocks.0 over the same 9 positions", "(4 + 9, 4), its sequence is dim 0", "plan['rope'] = {0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True)}"]),
    "half the rope": ({"rope": {0: ROPE[0]}}, ["an output of rope is left whole", "over the same 9 positions"]),
    "split missing": ({"blocks.0": {}, "rope": {}}, ["plan['proj_out'] gathers dim 1 of output 0 of proj_out, which nothing has split", "(2, 9, 6), its sequence is dim 1"]),
    "gather too early": ({"norm_out": Output(1)}, ["plan['proj_out'] gathers dim 1 of output 0 of proj_out, which nothing has split"]),
    "gather in another dim": ({"proj_out": Output(2, 3)}, ["gathers dim 2 of output 0 of proj_out, which is split in dim 1", "SequenceParallelOutput(gather_dim=1, expected_dims=3)"]),
    "split twice": ({"blocks.*": {"hidden_states": Input(1, 3)}, "blocks.0": {}}, ["splits dim 1 of input 'hidden_states' of blocks.1, which plan['blocks.*']['hidden_states'] has split already, at input 'hidden_states' of blocks.0", "an entry for blocks.0 alone, or a gather between them"]),
    "text too short": ({"rope": {i: Partial(0, 3, 2, True) for i in (0, 1)}}, ["left whole, while plan['rope'][0] splits output 0 of rope over the same 1 positions"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_is_refused(model, inputs, case):
    changes, parts = WRONG[case]
    with pytest.raises(PlanError) as caught:
        seqpar.plan(model, inputs, ulysses=2, sp_plan={**GOOD, **changes})
    for part in parts:
        assert part in str(caught.value), caught.value
    if "the graph says" in str(caught.value):
        assert "  where: " in str(caught.value) and ".py:" in str(caught.value) and "  write: " in str(caught.value)


def test_all_entries_that_fit_no_tensor_are_told_at_once(model, inputs):
    plan = {
        "rope": {0: Partial(0, 14, 2, True), 1: Partial(0, "words", 2, True), 2: Input(0, 2, True)},
        "blocks.0": {"hidden_states": Input(3), "text": [Input(1), Input(1)], "tables": Input(0)},
        "blocks.1": {"tables": [Input(0)] * 3},
        "blocks.*": Output(1),
        "norm_out": {"input": Partial(1, "pooled")},
    }
    with pytest.raises(PlanError) as caught:
        seqpar.plan(model, {**inputs, "pooled": torch.tensor(4.0)}, sp_plan=plan)
    for part in (
        "plan['rope'][0]: output 0 of rope [13, 4] is shorter in dim 0 than its text, text_len_source=14",
        "plan['rope'][1]: output 1 of rope needs text_len_source='words', which is given neither to the module nor to the model in this call",
        "plan['rope'][2]: rope returns fewer outputs: there is no output 2",
        "plan['blocks.0']['hidden_states']: input 'hidden_states' of blocks.0 has 3 dims [2, 9, 8]: there is no dim 3",
        "plan['blocks.0']['text'][0]: input 'text' of blocks.0 is one tensor, and the plan lists 2",
        "plan['blocks.0']['tables']: input 'tables' of blocks.0 is a tuple, not a tensor; it has 2 entries: declare a list of as many",
        "plan['blocks.1']['tables'][0]: input 'tables' of blocks.1 is a list of 2, and the plan lists 3",
        "plan['blocks.*']: blocks.0 returns 2 outputs, and the plan gathers 1",
        "plan['norm_out']['input']: input 'input' of norm_out needs text_len_source='pooled' to be an integer or a tensor of that length, not a tensor []",
    ):
        assert part in str(caught.value), caught.value


def test_no_gather_before_what_lays_the_sequence_out(model, inputs):
    with pytest.raises(PlanError, match=r"(?s)no gather follows before aten.*\(2, 9, 6\), its sequence is dim 1, split in dim 1.*test_contradictions.py.*plan\['proj_out'\] = SequenceParallelOutput\(gather_dim=1"):
        seqpar.plan(model, inputs, ulysses=2, sp_plan={k: v for k, v in GOOD.items() if k != "proj_out"})


class Attention(nn.Module):
    def forward(self, x):
        h = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(h, h * 2, h * 3).transpose(1, 2).flatten(2)


class Plain(nn.Module):
    """Tokens in, tokens out."""

    def __init__(self, end="tokens"):
        super().__init__()
        self.proj_out, self.block, self.end = nn.Linear(16, 3), Attention(), end

    def forward(self, x, bias=None):
        h = self.block(x if bias is None else x + bias)
        if self.end == "mean":
            h = h.mean(1)
        elif self.end == "slice":
            h = h[:, 2:]
        elif self.end == "ones":
            h = h * torch.ones(h.shape[:2], dtype=h.dtype)[..., None]
        return self.proj_out(h)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("tokens", "an output of the model stays split in dim 1"),
        ("mean", "no gather follows before aten.mean.dim, which combines its positions"),
        ("slice", "no gather follows before aten.slice.Tensor, which takes a part of it"),
    ],
)
def test_what_stays_split(end, message):
    with pytest.raises(PlanError) as caught:
        seqpar.plan(Plain(end), (torch.randn(2, 8, 16),), sp_plan={"block": {"x": Input(1)}})
    assert message in str(caught.value) and "SequenceParallelOutput(gather_dim=1, expected_dims=3)" in str(caught.value), caught.value


def test_an_input_left_whole_is_named():
    plan = {"": {"x": Input(1)}, "proj_out": Output(1)}
    with pytest.raises(PlanError, match=r"(?s)input 'bias' of the model is left whole.*plan\[''\]\['bias'\] = SequenceParallelInput\(split_dim=0, expected_dims=2\)"):
        seqpar.plan(Plain(), (torch.randn(2, 8, 16), torch.randn(8, 16)), ulysses=2, sp_plan=plan)


def test_constants_made_for_any_size_fit_parts():
    report = seqpar.verify(Plain("ones"), (torch.randn(2, 7, 16),), ulysses=2, sp_plan={"": {"x": Input(1)}, "proj_out": Output(1)})
    assert report.ok


def test_expected_dims_of_a_tensor_without_the_sequence():
    """A class's plan serves checkpoints with per-token and with per-picture biases: the latter have nothing to split, and that is said."""
    model, x = Plain(), torch.randn(2, 8, 16)
    plan = {"": {"x": Input(1), "bias": Input(1, 3)}, "proj_out": Output(1)}
    report = seqpar.verify(model, (x, torch.randn(16)), ulysses=2, sp_plan=plan)
    assert report.ok
    assert any(note.startswith("plan['']['bias']: nothing to split: expected_dims=3, but input 'bias' of the model has 1 dims") for note in report.plan.notes)
