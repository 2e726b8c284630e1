"""Stable Diffusion 3.5: dual-stream blocks on [image | text]; the tiny form adds a block with a second self-attention."""

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from seqpar.models.family import Config, Family, Request, Sampler, latent_grid


def _construct(config: Config) -> nn.Module:
    return SD3Transformer2DModel(**config)


def _shrink(heads: int, layers: int) -> Config:
    return {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": layers,
        "attention_head_dim": 16,
        "num_attention_heads": heads,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16 * heads,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 96,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }


def _inputs(config: Config, request: Request) -> dict[str, Any]:
    """hidden_states [batch, channels, height, width] in latent cells; a token is 2 x 2 of them."""
    sample = Sampler(request)
    _, height, width = latent_grid(request, pixels=8)
    return {
        "hidden_states": sample.normal(request.batch, config["in_channels"], height, width),
        "timestep": sample.place(torch.full((request.batch,), 700.0)),
        "encoder_hidden_states": sample.normal(request.batch, request.text_len, config["joint_attention_dim"]),
        "pooled_projections": sample.normal(request.batch, config["pooled_projection_dim"]),
        "joint_attention_kwargs": None,
    }


FAMILY = Family(
    name="sd3",
    construct=_construct,
    shrink=_shrink,
    full={
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 38,
        "attention_head_dim": 64,
        "num_attention_heads": 38,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 2432,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "dual_attention_layers": (),
        "qk_norm": "rms_norm",
    },
    inputs=_inputs,
    native={"height": 1024, "width": 1024, "text_len": 333},
)
