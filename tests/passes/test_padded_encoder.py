"""torch's own encoder, in evaluation, returns zeros at padding: so does the program."""

import pytest
import torch
from torch import Tensor, nn

import seqpar
from seqpar.models.randomise import randomise

WIDTH, LENGTH = 32, 61


class Pooled(nn.Module):
    """What is beside the padding depends on it: a mean over all positions."""

    def __init__(self, norm: bool, nested: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH) if norm else None, enable_nested_tensor=nested)

    def forward(self, x_BSD: Tensor, padding_BS: Tensor) -> tuple[Tensor, Tensor]:
        out = self.encoder(x_BSD, src_key_padding_mask=padding_BS)
        return out, out.mean(1)


def padding(kind: str) -> Tensor:
    hidden = torch.arange(LENGTH)[None] >= torch.tensor([[LENGTH], [15]])
    if kind == "left":
        hidden = hidden.flip(1)
    return torch.zeros(2, LENGTH).masked_fill(hidden, float("-inf")) if kind == "float" else hidden


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["right", "left", "float"])
def test_padding_is_what_the_model_makes_of_it(kind: str, norm: bool) -> None:
    model, inputs = randomise(Pooled(norm)).eval(), (torch.randn(2, LENGTH, WIDTH), padding(kind))
    with torch.no_grad():
        out = model(*inputs)[0]
    assert (out[1, 15:].std(0).max() == 0) == (kind != "left"), "torch nests padding at the end only"
    report = seqpar.verify(model, inputs, ulysses=2)
    assert report.ok and report.plan.sharded_flop_fraction > 0.85, report
    assert "forward" not in vars(model.encoder) and (model.encoder.norm is not None) == norm


@pytest.mark.parametrize("change", ["training", "without nesting", "off"])
def test_where_torch_does_not_nest_padding_is_computed(change: str) -> None:
    model, inputs = randomise(Pooled(True, nested=change != "without nesting")), (torch.randn(2, LENGTH, WIDTH), padding("right"))
    if change == "training":
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.MultiheadAttention):
                module.p = module.dropout = 0.0
    model.train(change == "training")
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(change != "off")
        report = seqpar.verify(model, inputs, ulysses=2)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert report.ok, report


def test_one_program_for_masks_of_any_content() -> None:
    model = randomise(Pooled(False)).eval()
    fast = seqpar.sp_compile(model, (torch.randn(2, LENGTH, WIDTH), padding("right")))
    for kind in ("right", "left"):
        x = torch.randn(2, LENGTH, WIDTH)
        with torch.no_grad():
            for mine, expected in zip(fast(x, padding(kind)), model(x, padding(kind)), strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
