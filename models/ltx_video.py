"""LTX-Video 0.9: self-attention over packed latents, cross-attention to padded text with a mask."""

from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import nn

from seqpar.models.family import Config, Family, Request, Sampler, latent_grid


def _construct(config: Config) -> nn.Module:
    return LTXVideoTransformer3DModel(**config)


def _shrink(heads: int, layers: int) -> Config:
    return {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": heads,
        "attention_head_dim": 16,
        "cross_attention_dim": 16 * heads,
        "num_layers": layers,
        "caption_channels": 32,
    }


def _inputs(config: Config, request: Request) -> dict[str, Any]:
    """hidden_states [batch, frames * rows * columns, channels]; the grid travels as ints, the rotary scale as floats."""
    sample = Sampler(request)
    frames, rows, columns = latent_grid(request, pixels=32, frames=8)
    return {
        "hidden_states": sample.normal(request.batch, frames * rows * columns, config["in_channels"]),
        "encoder_hidden_states": sample.normal(request.batch, request.text_len, config["caption_channels"]),
        "timestep": sample.place(torch.full((request.batch,), 700.0)),
        "encoder_attention_mask": sample.text_mask(request, torch.bool),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
    }


FAMILY = Family(
    name="ltx-video",
    construct=_construct,
    shrink=_shrink,
    full={
        "in_channels": 128,
        "out_channels": 128,
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "cross_attention_dim": 2048,
        "num_layers": 28,
        "caption_channels": 4096,
    },
    inputs=_inputs,
    native={"height": 512, "width": 704, "frames": 161, "text_len": 128},
    pixels_per_token=32,
    frames_per_token=8,
    default_pad_text=4,
)
