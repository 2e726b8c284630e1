"""`derive_sp_plan` as a user sees it: plans of small models of one's own, reasons with lines, and diffusers' plans."""

import inspect

import pytest
import torch
from torch import nn

import seqpar
from seqpar.derive import NoPlanError, derive_sp_plan
from seqpar.sp_plan import SequenceParallelInput, SequenceParallelOutput, SequenceParallelPartialInput
from seqpar.tools.coverage_cases import all_cases

CASES = {case.name: case for case in all_cases()}
WIDTH, HEADS, TOKENS, TEXT = 32, 4, 16, 8


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Table(nn.Module):
    """[tokens, width] of positions."""

    def __init__(self):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(WIDTH))

    def forward(self, tokens):
        return torch.outer(torch.arange(tokens).float(), self.frequencies).sin()


class Block(nn.Module):
    """`inline` adds the positions between a projection and the attention, where no plan can name them."""

    def __init__(self, inline=False):
        super().__init__()
        self.inline = inline
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x, table):
        qkv = self.qkv(x + table)
        if self.inline:
            qkv = qkv + torch.arange(TOKENS)[None, :, None].to(x.dtype)
        q, k, v = (heads(y) for y in qkv.chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ff(x)


class Picture(nn.Module):
    """One stream."""

    def __init__(self, inline=False):
        super().__init__()
        self.embed, self.rope, self.proj_out = nn.Linear(WIDTH, WIDTH), Table(), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block(inline) for _ in range(3))

    def forward(self, hidden_states):
        x, table = self.embed(hidden_states), self.rope(TOKENS)
        for block in self.blocks:
            x = block(x, table)
        return self.proj_out(x)


class Joint(nn.Module):
    """Text and image in one sequence, with positions for both. The text is too short to be split."""

    def __init__(self):
        super().__init__()
        self.embed, self.text, self.rope, self.proj_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Embedding(64, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, hidden_states, encoder_hidden_states, text_ids, image_ids):
        table = self.rope(torch.cat([text_ids, image_ids]))
        x = torch.cat([self.text(encoder_hidden_states), self.embed(hidden_states)], 1)
        for block in self.blocks:
            x = block(x, table)
        return self.proj_out(x[:, encoder_hidden_states.shape[1] :])


class Joined(Joint):
    """Positions of both come in one input, or an embedder makes those of the image and the table of both."""

    def __init__(self):
        super().__init__()
        self.embedder = Embedder()

    def forward(self, hidden_states, encoder_hidden_states, ids, text_ids=None):
        table = self.rope(ids) if text_ids is None else self.embedder(text_ids, hidden_states.shape[1])
        x = torch.cat([self.text(encoder_hidden_states), self.embed(hidden_states)], 1)
        for block in self.blocks:
            x = block(x, table)
        return self.proj_out(x[:, encoder_hidden_states.shape[1] :])


class Embedder(nn.Embedding):
    def __init__(self):
        super().__init__(64, WIDTH)

    def forward(self, text_ids, tokens):
        return super().forward(torch.cat([text_ids, torch.arange(tokens)]))


class Pair(nn.Module):
    """Blocks return two streams; an operator that needs all of the first one follows inline."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Both() for _ in range(2))

    def forward(self, hidden_states, encoder_hidden_states):
        x, text = hidden_states, encoder_hidden_states
        for block in self.blocks:
            x, text = block(x, text)
        return torch.sort(x, 1)[0]


class Both(Block):
    def forward(self, x, text):
        y = super().forward(torch.cat([text, x], 1), 0.0)
        return y[:, text.shape[1] :], y[:, : text.shape[1]]


class Crossing(nn.Module):
    """An image that reads a text as well; one module makes the positions of both."""

    def __init__(self):
        super().__init__()
        self.text, self.rope, self.proj_out = nn.Linear(WIDTH, WIDTH), Table(), nn.Linear(WIDTH, 4)
        self.blocks, self.readers = nn.ModuleList(Block() for _ in range(2)), nn.ModuleList(Reader() for _ in range(2))

    def forward(self, hidden_states, encoder_hidden_states):
        x, text = hidden_states, self.text(encoder_hidden_states)
        table, text_table = self.rope(TOKENS), self.rope(encoder_hidden_states.shape[1])
        for block, reader in zip(self.blocks, self.readers, strict=True):
            x = reader(block(x, table), text, text_table)
        return self.proj_out(x)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x, text, table):
        k, v = self.kv(text + table).chunk(2, -1)
        return x + nn.functional.scaled_dot_product_attention(heads(self.q(x)), heads(k), heads(v)).transpose(1, 2).flatten(2)


def picture_inputs():
    return {"hidden_states": torch.randn(1, TOKENS, WIDTH)}


def joint_inputs(text=TEXT):
    return {"hidden_states": torch.randn(1, TOKENS, WIDTH), "encoder_hidden_states": torch.randn(1, text, WIDTH), "text_ids": torch.arange(text), "image_ids": torch.arange(TOKENS)}


@pytest.fixture(scope="module")
def picture_plan():
    torch.manual_seed(0)
    return derive_sp_plan(Picture(), picture_inputs(), ulysses=2)


def test_the_plan_names_what_the_compiler_splits(picture_plan):
    assert picture_plan == {
        "": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "rope": {0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    }


def test_the_plan_is_accepted_by_the_compiler(picture_plan):
    model = Picture()
    with_plan = seqpar.plan(model, picture_inputs(), ulysses=2, sp_plan=picture_plan)
    assert with_plan.sharded_flop_fraction == seqpar.plan(model, picture_inputs(), ulysses=2).sharded_flop_fraction > 0.9


def test_an_inline_operator_is_named_with_its_line():
    with pytest.raises(NoPlanError) as error:
        derive_sp_plan(Picture(inline=True), picture_inputs(), ulysses=2)
    source, start = inspect.getsourcelines(Block.forward)
    line = start + next(i for i, text in enumerate(source) if "torch.arange" in text)
    assert f"test_derive.py:{line}" in str(error.value)
    assert f"Extract line {line} of forward" in str(error.value)


def test_text_that_stays_whole_beside_a_sharded_image():
    """Three text positions are too few for four ranks: they are kept."""
    plan = derive_sp_plan(Joint(), joint_inputs(text=3), ulysses=4)
    assert plan[""].keys() == {"hidden_states", "image_ids"}
    assert seqpar.verify(Joint(), joint_inputs(text=3), ulysses=4, sp_plan=plan).ok


def test_the_second_part_of_a_table_is_split():
    """The text's length is a number, or a parameter of that module whose dim 0 it is: a hook knows no other, and takes no other dim."""
    joint = joint_inputs(text=3)
    inputs = {name: joint[name] for name in ("hidden_states", "encoder_hidden_states")}
    plan = derive_sp_plan(Joined(), {**inputs, "ids": torch.arange(3 + TOKENS)}, ulysses=4)
    assert plan[""]["ids"] == SequenceParallelPartialInput(split_dim=0, text_len_source=3, expected_dims=1)
    plan = derive_sp_plan(Joined(), {**inputs, "ids": None, "text_ids": torch.arange(3)}, ulysses=4)
    assert plan["embedder"] == {0: SequenceParallelPartialInput(split_dim=0, text_len_source="text_ids", expected_dims=2, split_output=True)}


def test_a_module_called_for_two_sequences_is_not_where_one_of_them_is_split():
    """A plan speaks of a module, not of its first call."""
    inputs = {"hidden_states": torch.randn(1, TOKENS, WIDTH), "encoder_hidden_states": torch.randn(1, 3, WIDTH)}
    plan = derive_sp_plan(Crossing(), inputs, ulysses=2)
    assert "rope" not in plan and plan["blocks.*"]["table"] == SequenceParallelInput(split_dim=0, expected_dims=2)


def test_of_several_outputs_those_stay_as_they_are_that_nobody_needs_whole():
    inputs = {"hidden_states": torch.randn(1, TOKENS, WIDTH), "encoder_hidden_states": torch.randn(1, TOKENS, WIDTH)}
    plan = derive_sp_plan(Pair(), inputs, ulysses=2)
    assert plan["blocks.1"] == [SequenceParallelOutput(gather_dim=1, expected_dims=3), None]


def test_a_model_without_attention_over_ranks_has_no_plan():
    with pytest.raises(NoPlanError, match="nothing to declare"):
        derive_sp_plan(nn.Linear(4, 4), (torch.randn(8, 4),), ulysses=2)


def test_a_cp_plan_is_for_models_of_diffusers():
    with pytest.raises(NoPlanError, match="enable_parallelism"):
        derive_sp_plan(Picture(), picture_inputs(), ulysses=2, style="cp_plan")


def test_styles_are_checked():
    with pytest.raises(ValueError, match="style must be one of"):
        derive_sp_plan(Picture(), picture_inputs(), ulysses=2, style="plan")


@pytest.fixture(scope="module")
def flux():
    case = CASES["FluxTransformer2DModel"]
    return case.build(), case.inputs("even")


def test_flux_gets_the_plan_it_ships(flux):
    model, inputs = flux
    assert derive_sp_plan(model, inputs, ulysses=2, style="cp_plan") == model._cp_plan


def test_heads_that_ulysses_does_not_divide_are_refused(flux):
    model, inputs = flux
    with pytest.raises(NoPlanError, match="4 heads over ulysses=3"):
        derive_sp_plan(model, inputs, ulysses=3, style="cp_plan")


def test_attention_that_knows_of_no_ranks_is_named():
    case = CASES["SD3Transformer2DModel"]
    with pytest.raises(NoPlanError, match="does not exchange over the ranks") as error:
        derive_sp_plan(case.build(), case.inputs("even"), ulysses=2, style="cp_plan")
    assert "attention_processor.py:" in str(error.value)
