"""The pattern models: what their names promise."""

import torch

from seqpar.models import registry
from seqpar.models.patterns import RotaryTables, apply_rope
from seqpar.models.randomise import randomise


def test_rotary_tables_keep_lengths_and_know_distances_only():
    tables = RotaryTables(16)
    vector = torch.randn(1, 1, 1, 16).expand(1, 1, 2, 16)
    ids = torch.tensor([[0.0, 1.0, 2.0], [1.0, 4.0, 2.0]])
    one, two = (apply_rope(vector, tables(ids + shift)) for shift in (0, 3))
    torch.testing.assert_close(one.norm(dim=-1), vector.norm(dim=-1))
    torch.testing.assert_close((one[..., 0, :] * one[..., 1, :]).sum(), (two[..., 0, :] * two[..., 1, :]).sum())


@torch.no_grad()
def test_unified_padding_changes_nothing():
    family = registry.get("pattern-unified")
    model = randomise(family.build())
    inputs = family.grid_inputs(rows=3, columns=5, batch=2, text_len=9, pad_text=4)
    together = model(**inputs)
    for index, out in enumerate(together):
        alone = model(**{key: [value[index]] for key, value in inputs.items()})
        torch.testing.assert_close(alone[0], out)


@torch.no_grad()
def test_standard_restores_the_picture_layout():
    family = registry.get("pattern-standard")
    model = randomise(family.build())
    inputs = family.grid_inputs(rows=3, columns=5)
    out, moved = model(**inputs), dict(inputs)
    assert out.shape == inputs["hidden_states"].shape
    model.blocks = torch.nn.ModuleList()
    moved["hidden_states"] = inputs["hidden_states"].clone()
    moved["hidden_states"][..., 2:4, 4:6] += 1
    changed = (model(**moved) != model(**inputs)).any(dim=1)[0].nonzero()
    assert changed.amin(0).tolist() == [2, 4] and changed.amax(0).tolist() == [3, 5]
