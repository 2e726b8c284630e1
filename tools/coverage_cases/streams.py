"""Transformers with two streams and rotary ids, in the manner of FLUX; their inputs are packed tokens."""

from typing import Any

import torch

from seqpar.tools.coverage_cases.case import Case, Draw, diffusers_case

FLUX: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 4)}


def packed(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.normal(d.batch, d.tokens, 16), "encoder_hidden_states": d.words(24), "timestep": d.times(), "img_ids": d.grid_ids(), "txt_ids": torch.zeros(d.text, 3)}


def flux(d: Draw) -> dict[str, Any]:
    return {**packed(d), "pooled_projections": d.normal(d.batch, 20), "guidance": d.times(4.0)}


def chroma(d: Draw) -> dict[str, Any]:
    mask = torch.cat([d.mask(), torch.ones(d.batch, d.tokens, dtype=torch.bool)], dim=1)
    return {**packed(d), "attention_mask": mask}


def bria_fibo(d: Draw) -> dict[str, Any]:
    return {**packed(d), "text_encoder_layers": [d.words(12) for _ in range(2)]}


def four_ids(d: Draw) -> dict[str, Any]:
    text = torch.zeros(d.text, 4)
    text[:, 3] = torch.arange(d.text)
    return {**packed(d), "img_ids": d.grid_ids(4), "txt_ids": text}


def flux2(d: Draw) -> dict[str, Any]:
    return {**four_ids(d), "guidance": d.times(4.0)}


def qwen(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(d.batch, d.tokens, 16),
        "encoder_hidden_states": d.words(24),
        "encoder_hidden_states_mask": d.mask(),
        "timestep": d.times(),
        "img_shapes": [(1, d.rows, d.cols)] * d.batch,
    }


def krea(d: Draw) -> dict[str, Any]:
    position = torch.cat([torch.zeros(d.text, 3), d.grid_ids()])
    return {
        "hidden_states": d.normal(d.batch, d.tokens, 16),
        "encoder_hidden_states": d.normal(d.batch, d.text, 3, 24),
        "timestep": d.times(),
        "position_ids": position,
        "encoder_attention_mask": d.mask(),
    }


def prefix_moe(d: Draw) -> dict[str, Any]:
    return {**qwen(d), "img_shapes": [(1, d.rows, d.cols)] * d.batch}


QWEN: dict[str, Any] = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 4)}
NUCLEUS: dict[str, Any] = {**QWEN, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8), "num_experts": 4, "moe_intermediate_dim": 16, "capacity_factors": 2.0}

CASES: tuple[Case, ...] = (
    diffusers_case("FluxTransformer2DModel", flux, in_channels=16, pooled_projection_dim=20, guidance_embeds=True, **FLUX),
    diffusers_case("BriaTransformer2DModel", packed, in_channels=16, **FLUX),
    diffusers_case("BriaFiboTransformer2DModel", bria_fibo, in_channels=16, text_encoder_dim=12, **FLUX),
    diffusers_case("ChromaTransformer2DModel", chroma, in_channels=16, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **FLUX),
    diffusers_case("Flux2Transformer2DModel", flux2, in_channels=16, timestep_guidance_channels=8, **{**FLUX, "axes_dims_rope": (2, 2, 2, 2)}),
    diffusers_case("Flux3Transformer2DModel", four_ids, in_channels=16, cond_in_channels=16, timestep_channels=8, **{**FLUX, "axes_dims_rope": (2, 2, 2, 2)}),
    diffusers_case("LongCatImageTransformer2DModel", packed, in_channels=16, pooled_projection_dim=24, **FLUX),
    diffusers_case("OvisImageTransformer2DModel", packed, in_channels=16, out_channels=16, **FLUX),
    diffusers_case("QwenImageTransformer2DModel", qwen, **QWEN),
    diffusers_case("NucleusMoEImageTransformer2DModel", prefix_moe, **{**NUCLEUS, "moe_enabled": False}),
    diffusers_case("NucleusMoEImageTransformer2DModel@moe", prefix_moe, **{**NUCLEUS, "dense_moe_strategy": "leave_first_block_dense"}),
    diffusers_case("Krea2Transformer2DModel", krea, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=24, num_text_layers=3, text_num_attention_heads=4, text_num_key_value_heads=4, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(2, 2, 4)),
)
