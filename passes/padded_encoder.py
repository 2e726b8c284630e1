"""`nn.TransformerEncoder` in evaluation skips padding: it runs on nested tensors, and returns zeros there. No tracer follows it; torch.export and
torch.compile trace the branch that computes padding like any other position.

While a model is traced its encoders take that branch, and set the same positions to zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

DEVICES = ("cpu", "cuda", "xpu")  # on which torch has its kernels for nested tensors


@contextmanager
def padding_zeroed(model: nn.Module) -> Iterator[None]:
    """Active while `model` is traced, without gradients."""
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and type(m).forward is nn.TransformerEncoder.forward and "forward" not in vars(m)]
    for encoder in encoders:
        encoder.forward = partial(_forward, encoder)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.forward


def _forward(encoder: nn.TransformerEncoder, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool | None = None) -> Tensor:
    run = partial(nn.TransformerEncoder.forward, encoder, src, mask, src_key_padding_mask, is_causal)
    if src_key_padding_mask is None or mask is not None or not _nests(encoder, src):
        return run()
    norm, encoder.norm = encoder.norm, None
    try:
        out_BSD = run()
    finally:
        encoder.norm = norm
    hidden_BS = src_key_padding_mask if src_key_padding_mask.dtype == torch.bool else src_key_padding_mask != 0
    aligned = (hidden_BS[:, :-1] <= hidden_BS[:, 1:]).all()  # torch nests padding at the end only
    out_BSD = out_BSD.masked_fill((hidden_BS & aligned).unsqueeze(-1), 0.0)
    return out_BSD if norm is None else norm(out_BSD)


def _nests(encoder: nn.TransformerEncoder, src: Tensor) -> bool:
    """Whether torch runs this encoder on nested tensors, if it gets a padding mask and no other."""
    first = encoder.layers[0]
    able = torch.backends.mha.get_fastpath_enabled() and getattr(encoder, "use_nested_tensor", False)
    return bool(able and not first.training and src.dim() == 3 and src.device.type in DEVICES and not torch.is_autocast_enabled())
