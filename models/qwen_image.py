"""Qwen-Image: dual-stream blocks, rotary tables in complex numbers, computed from the grid sizes."""

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from seqpar.models.family import Config, Family, Request, Sampler, latent_grid


def _construct(config: Config) -> nn.Module:
    return QwenImageTransformer2DModel(**config)


def _shrink(heads: int, layers: int) -> Config:
    return {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": layers,
        "attention_head_dim": 16,
        "num_attention_heads": heads,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }


def _inputs(config: Config, request: Request) -> dict[str, Any]:
    """hidden_states [batch, rows * columns, channels]; text mask [batch, text_len], or None when nothing is padded (as in the pipeline)."""
    sample = Sampler(request)
    _, rows, columns = latent_grid(request, pixels=16)
    return {
        "hidden_states": sample.normal(request.batch, rows * columns, config["in_channels"]),
        "timestep": sample.place(torch.full((request.batch,), 0.7), request.dtype),
        "guidance": None,
        "encoder_hidden_states_mask": sample.text_mask(request, torch.long) if request.pad_text else None,
        "encoder_hidden_states": sample.normal(request.batch, request.text_len, config["joint_attention_dim"]),
        "img_shapes": [[(1, rows, columns)]] * request.batch,
        "attention_kwargs": {},
    }


FAMILY = Family(
    name="qwen-image",
    construct=_construct,
    shrink=_shrink,
    full={
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": (16, 56, 56),
    },
    inputs=_inputs,
    native={"height": 1328, "width": 1328, "text_len": 256},
)
