"""The diffusers families that have a hand-written context-parallel plan, at any width, depth and length."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seqpar.errors import SeqparError
from seqpar.models import registry
from seqpar.models.family import Config
from seqpar.models.randomise import randomise

PEER_MODELS = ("flux", "qwen-image", "wan", "ltx-video")
# The count of single-stream blocks follows the dual-stream ones, so `blocks` of Flux are half of each kind.
_TWO_KINDS = ("flux",)


@dataclass(frozen=True)
class Sizes:
    """heads x head_dim is the width; `blocks` in total; `tokens` of picture or video, `text_tokens` of text. Invariants: all >= 1."""

    heads: int = 8
    head_dim: int = 64
    blocks: int = 4
    tokens: int = 1024
    text_tokens: int = 64

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.blocks, self.tokens, self.text_tokens) < 1 or self.head_dim % 8:
            raise SeqparError(f"sizes must be >= 1 and head_dim a multiple of 8, got {self}")


def config_of(name: str, sizes: Sizes) -> Config:
    """The family's small configuration with another width and depth; Flux needs an even number of blocks."""
    family = registry.get(name)
    per_kind = sizes.blocks
    if name in _TWO_KINDS:
        if sizes.blocks % 2:
            raise SeqparError(f"{name} has two kinds of blocks, half of each: blocks must be even, got {sizes.blocks}")
        per_kind //= 2
    config = {**family.shrink(sizes.heads, per_kind), "attention_head_dim": sizes.head_dim}
    width = sizes.heads * sizes.head_dim
    spatial = sizes.head_dim * 3 // 8 // 2 * 2
    wanted = {
        "axes_dims_rope": (sizes.head_dim - 2 * spatial, spatial, spatial),
        "ffn_dim": 4 * width,
        "cross_attention_dim": width,
        "rope_max_seq_len": max(256, sizes.tokens),
    }
    return config | {key: value for key, value in wanted.items() if key in config}


def build(name: str, sizes: Sizes, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The unmodified diffusers class with weights that depend on the sizes only, so every rank and every copy has the same."""
    model = registry.get(name).build(config_of(name, sizes), device=device, dtype=dtype)
    return randomise(model)


def inputs_of(name: str, sizes: Sizes, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Keyword inputs of one call, `return_dict=False` and without a text mask: diffusers' plans accept nothing else here."""
    rows = max(r for r in range(1, math.isqrt(sizes.tokens) + 1) if sizes.tokens % r == 0)
    grid = {"rows": rows, "columns": sizes.tokens // rows, "text_len": sizes.text_tokens}
    inputs = registry.get(name).grid_inputs(config_of(name, sizes), **grid, device=device, dtype=dtype)
    # LTX repeats its mask over all heads, which Ulysses in diffusers has cut: it fails with any mask.
    return inputs | {"encoder_attention_mask": None} if "encoder_attention_mask" in inputs else inputs
