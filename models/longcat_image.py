"""LongCat-Image: dual-stream then single-stream blocks; image positions start behind the text's."""

from typing import Any

import torch
from diffusers import LongCatImageTransformer2DModel
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
    return LongCatImageTransformer2DModel(**config)


def _shrink(heads: int, layers: int) -> Config:
    return {
        "in_channels": 64,  # the pipeline fixes 16 latent channels in 2 x 2 patches
        "num_layers": layers,
        "num_single_layers": layers,
        "attention_head_dim": 16,
        "num_attention_heads": heads,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 6, 6],
    }


def _inputs(config: Config, request: Request) -> dict[str, Any]:
    """hidden_states [batch, rows * columns, channels]; text ids count up, image ids start at (1, text_len, text_len)."""
    sample = Sampler(request)
    _, rows, columns = latent_grid(request, pixels=16)
    text_ids = torch.arange(request.text_len, dtype=torch.float32)[:, None] * torch.tensor([0.0, 1.0, 1.0])
    return {
        "hidden_states": sample.normal(request.batch, rows * columns, config["in_channels"]),
        "timestep": sample.place(torch.full((request.batch,), 0.7), request.dtype),
        "guidance": None,
        "encoder_hidden_states": sample.normal(request.batch, request.text_len, config["joint_attention_dim"]),
        "txt_ids": sample.place(text_ids),
        "img_ids": sample.place(image_ids(rows, columns, modality=1, start=request.text_len)),
    }


FAMILY = Family(
    name="longcat-image",
    construct=_construct,
    shrink=_shrink,
    full={
        "in_channels": 64,
        "num_layers": 10,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "pooled_projection_dim": 3584,
        "axes_dims_rope": [16, 56, 56],
    },
    inputs=_inputs,
    native={"height": 768, "width": 1344, "text_len": 512},
    single_layers_key="num_single_layers",
)
