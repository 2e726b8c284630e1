"""Z-Image: lists of pictures and captions, refined apart, then concatenated inline per element and padded to a batch."""

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import nn

from seqpar.models.family import Config, Family, Request, Sampler, latent_grid


def _construct(config: Config) -> nn.Module:
    return ZImageTransformer2DModel(**config)


def _shrink(heads: int, layers: int) -> Config:
    return {
        "in_channels": 4,
        "dim": 16 * heads,
        "n_layers": layers,
        "n_refiner_layers": 1,
        "n_heads": heads,
        "n_kv_heads": heads,
        "cap_feat_dim": 32,
        "axes_dims": [4, 6, 6],
        "axes_lens": [1024, 256, 256],
    }


def _inputs(config: Config, request: Request) -> dict[str, Any]:
    """x: one [channels, 1, height, width] per element; cap_feats: one [length, width] per element, the last `pad_text` shorter.

    The model itself pads pictures and captions to multiples of 32 tokens.
    """
    sample = Sampler(request)
    _, height, width = latent_grid(request, pixels=8)
    lengths = [request.text_len] * (request.batch - 1) + [request.text_len - request.pad_text]
    latents = sample.normal(request.batch, config["in_channels"], 1, height, width)
    return {
        "x": list(latents.unbind(0)),
        "t": sample.place(torch.full((request.batch,), 0.3)),
        "cap_feats": [sample.normal(length, config["cap_feat_dim"]) for length in lengths],
        "joint_attention_kwargs": None,
    }


FAMILY = Family(
    name="z-image",
    construct=_construct,
    shrink=_shrink,
    full={
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "cap_feat_dim": 2560,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    },
    inputs=_inputs,
    native={"height": 1024, "width": 1024, "text_len": 128},
    layers_key="n_layers",
)
