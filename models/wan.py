"""Wan 2.2: the 14B text-to-video form, and the TI2V-5B form with one timestep per token."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from seqpar.models.family import Config, Family, Request, Sampler, latent_grid


def _construct(config: Config) -> nn.Module:
    return WanTransformer3DModel(**config)


def _shrink(heads: int, layers: int) -> Config:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 4 * heads * 16,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 256,
    }


def _published(heads: int, layers: int, channels: int, ffn: int) -> Config:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    }


def _inputs(vae_stride: int, timestep: Callable[[int, int, int, int], torch.Tensor]) -> Callable[[Config, Request], dict[str, Any]]:
    def inputs(config: Config, request: Request) -> dict[str, Any]:
        """hidden_states [batch, channels, frames, height, width] in latent cells; a token is 2 x 2 of them."""
        sample = Sampler(request)
        frames, height, width = latent_grid(request, pixels=vae_stride, frames=4)
        return {
            "hidden_states": sample.normal(request.batch, config["in_channels"], frames, height, width),
            "timestep": sample.place(timestep(request.batch, frames, height // 2, width // 2)),
            "encoder_hidden_states": sample.normal(request.batch, request.text_len, config["text_dim"]),
            "attention_kwargs": None,
        }

    return inputs


def _one_timestep(batch: int, frames: int, rows: int, columns: int) -> torch.Tensor:
    return torch.full((batch,), 700, dtype=torch.int64)


def _timestep_per_token(batch: int, frames: int, rows: int, columns: int) -> torch.Tensor:
    """[batch, tokens] float32: the first frame is the given picture and therefore clean."""
    per_frame = torch.full((frames, rows, columns), 700.0)
    if frames > 1:
        per_frame[0] = 0.0
    return per_frame.flatten().unsqueeze(0).expand(batch, -1)


FAMILY = Family(
    name="wan",
    construct=_construct,
    shrink=_shrink,
    full=_published(heads=40, layers=40, channels=16, ffn=13824),
    inputs=_inputs(vae_stride=8, timestep=_one_timestep),
    native={"height": 720, "width": 1280, "frames": 81, "text_len": 512},
    frames_per_token=4,
)

TI2V_FAMILY = Family(
    name="wan-ti2v",
    construct=_construct,
    shrink=_shrink,
    full=_published(heads=24, layers=30, channels=48, ffn=14336),
    inputs=_inputs(vae_stride=16, timestep=_timestep_per_token),
    native={"height": 704, "width": 1280, "frames": 121, "text_len": 512},
    pixels_per_token=32,
    frames_per_token=4,
)
