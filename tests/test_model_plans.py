"""The plans that diffusers' own classes ship: what passes, what the graph contradicts, and that pinned programs compute the model."""

import diffusers
import pytest
import torch

import seqpar
from seqpar.compile import traced_with
from seqpar.errors import PlanError
from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.sp_plan import declarations, get_sp_plan_from_model
from seqpar.tools.coverage_cases import all_cases
from seqpar.tools.coverage_cases.audio import LTX2
from seqpar.verification import verify_traced

CASES = {case.name: case for case in all_cases()}
FAMILIES = ("flux", "qwen-image", "wan")  # also compared with the model
CHECKED = ("ChronoEditTransformer3DModel", "HeliosTransformer3DModel", "LTXVideoTransformer3DModel", "MiniMaxH3Transformer3DModel")


@pytest.mark.parametrize("name", FAMILIES)
def test_pinned_programs_compute_the_model(name):
    family = registry.get(name)
    config = family.tiny_config(4, 1)
    model = randomise(family.build(config))
    inputs = family.grid_inputs(config, rows=3, columns=5, times=1, text_len=7, batch=2, seed=0, return_dict=True)
    traced = traced_with(model, (), inputs, declarations(model, "model"), False)
    with torch.no_grad():
        expected = list(model(**inputs).to_tuple())
    for ulysses, ring in ((2, 1), (1, 2), (2, 2)):
        report = verify_traced(traced, ulysses=ulysses, ring=ring, expected=expected)
        assert report.ok and report.max_rel_err < 1e-5, (ulysses, ring, str(report))
        assert "plan['proj_out']: gathered in dim 1" in report.plan.notes
        assert any(f"15/{ulysses * ring} positions" in note for note in report.plan.notes), report.plan.notes


@pytest.mark.parametrize("name", CHECKED)
def test_the_classs_own_plan_passes(name):
    model = CASES[name].build()
    plan = {path: entry for path, entry in get_sp_plan_from_model(model).items() if exists(model, path)}  # one ships entries for 40 blocks
    notes = seqpar.plan(model, CASES[name].inputs("even"), sp_plan=plan).notes
    assert sum("one rank" in note for note in notes) >= 3, notes


def exists(model, path):
    try:
        model.get_submodule(path.replace("*", "0"))
    except AttributeError:
        return False
    return True


def test_position_ids_with_a_batch_dim():
    """Flux2's plan expects ids [batch, tokens, 4]. The model takes [tokens, 4] as well, which its hooks would leave whole."""
    case = CASES["Flux2Transformer2DModel"]
    model, inputs = case.build(), case.inputs("even")
    with pytest.raises(PlanError, match=r"(?s)plan\[''\]\['img_ids'\] expected_dims=3, but input 'img_ids' of the model has 2 dims.*\(16, 4\), its sequence is dim 0.*SequenceParallelInput\(split_dim=0, expected_dims=2\)"):
        seqpar.plan(model, inputs, ulysses=2, sp_plan="model")
    batched = {**inputs, "img_ids": inputs["img_ids"][None], "txt_ids": inputs["txt_ids"][None]}
    assert "plan['']['img_ids']: split in dim 1, 16/2 positions" in seqpar.plan(model, batched, ulysses=2, sp_plan="model").notes


def test_rotary_tables_that_a_shipped_plan_forgets():
    """LTX2 rotates queries of the attention between video and audio by tables of a second module, which its plan does not name."""
    model = diffusers.LTX2VideoTransformer3DModel(**{**LTX2, "num_layers": 1}).eval()
    inputs = CASES["LTX2VideoTransformer3DModel"].inputs("even")
    inputs |= {name: inputs[name][:, 0] for name in ("timestep", "audio_timestep")}
    with pytest.raises(PlanError, match=r"(?s)an output of cross_attn_rope is left whole, while plan\[''\]\['hidden_states'\] splits.*over the same 32 positions.*transformer_ltx2.py.*plan\['cross_attn_rope'\] ="):
        seqpar.plan(model, inputs, ulysses=2, sp_plan="model")
