"""ControlNets made of convolutions with attention between them: the encoder half of a U-Net."""

from typing import Any

import torch
from torch import nn

from seqpar.tools.coverage_cases.case import Case, Draw, diffusers_case

UNET: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 24, "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "conditioning_embedding_out_channels": (4, 8),
}
UNION: dict[str, Any] = {**UNET, "num_control_type": 2, "num_trans_channel": 16, "num_trans_head": 4, "num_proj_channel": 16, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16}
MOTION: dict[str, Any] = {**UNET, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "motion_num_attention_heads": 4, "conditioning_channels": 4}
CROSSED: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 4, "cross_attention_dim": 24, "num_attention_heads": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "ctrl_conditioning_embedding_out_channels": (4, 8), "ctrl_block_out_channels": (8, 16), "ctrl_num_attention_heads": 2, "ctrl_max_norm_num_groups": 4,
}


def latents(d: Draw) -> dict[str, Any]:
    """Rows and columns are even: the second stage works at half the size."""
    rows, cols = d.pick((4, 4), (6, 10), (32, 32))
    return {"sample": d.normal(d.batch, 4, rows, cols), "timestep": d.steps(), "encoder_hidden_states": d.words(24)}


def condition(d: Draw, channels: int = 3) -> torch.Tensor:
    rows, cols = d.pick((8, 8), (12, 20), (64, 64))
    return d.normal(d.batch, channels, rows, cols)


def control(d: Draw) -> dict[str, Any]:
    return {**latents(d), "controlnet_cond": condition(d), "conditioning_scale": 0.7}


def two_controls(d: Draw) -> dict[str, Any]:
    return {**latents(d), "controlnet_cond": [condition(d), condition(d)], "conditioning_scale": [0.7, 0.4], "return_dict": False}


def union(d: Draw) -> dict[str, Any]:
    types = torch.ones(d.batch, 2)
    return {**latents(d), "controlnet_cond": [condition(d), condition(d)], "control_type": types, "control_type_idx": [0, 1], "conditioning_scale": [0.7, 0.4]}


def two_unions(d: Draw) -> dict[str, Any]:
    first, second = torch.tensor([[1.0, 0.0]]).repeat(d.batch, 1), torch.tensor([[0.0, 1.0]]).repeat(d.batch, 1)
    return {**two_controls(d), "controlnet_cond": [[condition(d)], [condition(d)]], "control_type": [first, second], "control_type_idx": [[0], [1]]}


def sparse(d: Draw) -> dict[str, Any]:
    """A video: [batch, channels, frames, rows, columns]; the condition lives at the size of the latents."""
    frames, rows, cols = d.pick((2, 4, 4), (3, 6, 10), (4, 16, 16))
    shape = (frames, rows, cols)
    return {
        "sample": d.normal(d.batch, 4, *shape),
        "timestep": d.steps(),
        "encoder_hidden_states": d.words(24).repeat_interleave(frames, dim=0),
        "controlnet_cond": d.normal(d.batch, 4, *shape),
        "conditioning_mask": torch.ones(d.batch, 1, *shape),
        "conditioning_scale": 0.7,
    }


def several(container: str, part: str, config: dict[str, Any]) -> Any:
    def construct() -> nn.Module:
        from diffusers.models import controlnets

        return getattr(controlnets, container)([getattr(controlnets, part)(**config) for _ in range(2)])

    return construct


CONTROLNETS = "diffusers.models.controlnets"
CASES: tuple[Case, ...] = (
    diffusers_case("ControlNetModel", control, **UNET),
    Case("MultiControlNetModel", several("MultiControlNetModel", "ControlNetModel", UNET), two_controls),
    diffusers_case("ControlNetUnionModel", union, module=CONTROLNETS, **UNION),
    Case("MultiControlNetUnionModel", several("MultiControlNetUnionModel", "ControlNetUnionModel", UNION), two_unions),
    diffusers_case("SparseControlNetModel", sparse, **MOTION),
    diffusers_case("UNetControlNetXSModel", control, **CROSSED),
)
