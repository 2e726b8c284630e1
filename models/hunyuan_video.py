"""HunyuanVideo: a masked text refiner, then dual- and single-stream blocks on [image | padded text] with a key mask."""

from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from seqpar.models.family import Config, Family, Request, Sampler, latent_grid


def _construct(config: Config) -> nn.Module:
    return HunyuanVideoTransformer3DModel(**config)


def _shrink(heads: int, layers: int) -> Config:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": heads,
        "attention_head_dim": 16,
        "num_layers": layers,
        "num_single_layers": layers,
        "num_refiner_layers": 1,
        "guidance_embeds": True,
        "text_embed_dim": 32,
        "pooled_projection_dim": 24,
        "rope_axes_dim": (4, 6, 6),
    }


def _inputs(config: Config, request: Request) -> dict[str, Any]:
    """hidden_states [batch, channels, frames, height, width] in latent cells; a token is 1 x 2 x 2 of them."""
    sample = Sampler(request)
    frames, height, width = latent_grid(request, pixels=8, frames=4)
    return {
        "hidden_states": sample.normal(request.batch, config["in_channels"], frames, height, width),
        "timestep": sample.place(torch.full((request.batch,), 700.0), request.dtype),
        "encoder_hidden_states": sample.normal(request.batch, request.text_len, config["text_embed_dim"]),
        "encoder_attention_mask": sample.text_mask(request, torch.long),
        "pooled_projections": sample.normal(request.batch, config["pooled_projection_dim"]),
        "guidance": sample.place(torch.full((request.batch,), 6000.0), request.dtype) if config["guidance_embeds"] else None,
        "attention_kwargs": None,
    }


FAMILY = Family(
    name="hunyuan-video",
    construct=_construct,
    shrink=_shrink,
    full={
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "guidance_embeds": True,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "rope_axes_dim": (16, 56, 56),
    },
    inputs=_inputs,
    native={"height": 720, "width": 1280, "frames": 129, "text_len": 256},
    single_layers_key="num_single_layers",
    frames_per_token=4,
    default_pad_text=4,
)
