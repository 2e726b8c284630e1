"""FLUX.1-dev: dual-stream blocks on [text | image], then single-stream blocks."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from seqpar.models.family import (
    Config,
    Family,
    Request,
    Sampler,
    image_ids,
    latent_grid,
)


def _construct(config: Config) -> nn.Module:
    return FluxTransformer2DModel(**config)


def _shrink(heads: int, layers: int) -> Config:
    return {
        "in_channels": 16,
        "num_layers": layers,
        "num_single_layers": layers,
        "attention_head_dim": 16,
        "num_attention_heads": heads,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }


def _inputs(config: Config, request: Request) -> dict[str, Any]:
    """hidden_states [batch, rows * columns, channels]; text [batch, text_len, width]; ids without a batch dim."""
    sample = Sampler(request)
    _, rows, columns = latent_grid(request, pixels=16)
    guidance = torch.full([1], 3.5, dtype=torch.float32)
    return {
        "hidden_states": sample.normal(request.batch, rows * columns, config["in_channels"]),
        "timestep": sample.place(torch.full((request.batch,), 0.7), request.dtype),
        "guidance": sample.place(guidance).expand(request.batch) if config["guidance_embeds"] else None,
        "pooled_projections": sample.normal(request.batch, config["pooled_projection_dim"]),
        "encoder_hidden_states": sample.normal(request.batch, request.text_len, config["joint_attention_dim"]),
        "txt_ids": sample.place(torch.zeros(request.text_len, 3), request.dtype),
        "img_ids": sample.place(image_ids(rows, columns), request.dtype),
        "joint_attention_kwargs": {},
    }


FAMILY = Family(
    name="flux",
    construct=_construct,
    shrink=_shrink,
    full={
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    inputs=_inputs,
    native={"height": 1024, "width": 1024, "text_len": 512},
    single_layers_key="num_single_layers",
)
