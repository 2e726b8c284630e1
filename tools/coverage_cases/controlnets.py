"""ControlNets made of transformer blocks."""

from typing import Any

import torch
from torch import nn

from seqpar.tools.coverage_cases.case import Case, Draw, diffusers_case
from seqpar.tools.coverage_cases.images import hunyuan, sana, sd3, z_image
from seqpar.tools.coverage_cases.streams import FLUX, QWEN, flux, qwen
from seqpar.tools.coverage_cases.videos import COSMOS, NearestResize

FLUX_CONTROL: dict[str, Any] = {"in_channels": 16, "pooled_projection_dim": 20, "guidance_embeds": True, **FLUX}
QWEN_CONTROL: dict[str, Any] = {**QWEN, "in_channels": 16}
SD3: dict[str, Any] = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20, "pos_embed_max_size": 64}
HUNYUAN: dict[str, Any] = {
    "conditioning_channels": 3, "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "transformer_num_layers": 6,
    "cross_attention_dim": 24, "cross_attention_dim_t5": 16, "pooled_projection_dim": 16, "text_len": 4, "text_len_t5": 5,
}
SANA: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "num_cross_attention_heads": 4, "cross_attention_head_dim": 8, "cross_attention_dim": 32, "caption_channels": 24, "sample_size": 8}


def flux_control(d: Draw) -> dict[str, Any]:
    return {**flux(d), "controlnet_cond": d.normal(d.batch, d.tokens, 16), "conditioning_scale": 0.7}


def two_flux(d: Draw) -> dict[str, Any]:
    conditions = [d.normal(d.batch, d.tokens, 16) for _ in range(2)]
    return {**flux(d), "controlnet_cond": conditions, "controlnet_mode": [torch.zeros(d.batch, dtype=torch.long)] * 2, "conditioning_scale": [0.7, 0.4]}


def qwen_control(d: Draw) -> dict[str, Any]:
    return {**qwen(d), "controlnet_cond": d.normal(d.batch, d.tokens, 16), "conditioning_scale": 0.7}


def two_qwen(d: Draw) -> dict[str, Any]:
    return {**qwen(d), "controlnet_cond": [d.normal(d.batch, d.tokens, 16) for _ in range(2)], "conditioning_scale": [0.7, 0.4]}


def sd3_control(d: Draw) -> dict[str, Any]:
    return {**sd3(d), "controlnet_cond": d.image(4, 2), "conditioning_scale": 0.7}


def two_sd3(d: Draw) -> dict[str, Any]:
    return {**sd3(d), "controlnet_cond": [d.image(4, 2) for _ in range(2)], "conditioning_scale": [0.7, 0.4]}


def hunyuan_control(d: Draw) -> dict[str, Any]:
    return {**hunyuan(d), "controlnet_cond": d.image(4, 2), "conditioning_scale": 0.7}


def two_hunyuan(d: Draw) -> dict[str, Any]:
    return {**hunyuan(d), "controlnet_cond": [d.image(4, 2) for _ in range(2)], "conditioning_scale": [0.7, 0.4]}


def sana_control(d: Draw) -> dict[str, Any]:
    return {**sana(d), "controlnet_cond": d.image(4), "conditioning_scale": 0.7}


def z_control(d: Draw) -> dict[str, Any]:
    inputs = z_image(d)
    return {**inputs, "control_context": [d.normal(4, 1, 2 * d.rows, 2 * d.cols) for _ in inputs["x"]], "conditioning_scale": 0.7}


def cosmos_control(d: Draw) -> dict[str, Any]:
    rows, cols = 2 * d.video_rows, 2 * d.video_cols
    return {
        "controls_latents": d.video(4),
        "latents": d.video(4),
        "timestep": d.times(),
        "encoder_hidden_states": d.words(24),
        "condition_mask": torch.ones(d.batch, 1, d.frames, rows, cols),
        "conditioning_scale": 0.7,
        "padding_mask": torch.zeros(1, 1, rows, cols),
        "attention_mask": d.mask(),
    }


def several(name: str, part: str, count: int, config: dict[str, Any]) -> Any:
    """A constructor of the container `name` with `count` ControlNets of class `part`."""

    def construct() -> nn.Module:
        import diffusers
        from diffusers.models import controlnets

        container = getattr(controlnets, name)
        return container([getattr(diffusers, part)(**config) for _ in range(count)])

    return construct


def z_controlnet() -> nn.Module:
    """It borrows its embedders from a transformer."""
    from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

    common: dict[str, Any] = {"dim": 48, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4}
    transformer = ZImageTransformer2DModel(in_channels=4, n_layers=2, cap_feat_dim=24, axes_dims=[4, 4, 4], axes_lens=[1100, 64, 64], **common)
    control = ZImageControlNetModel(control_layers_places=[0, 1], control_refiner_layers_places=[0], control_in_dim=4, **common)
    return ZImageControlNetModel.from_transformer(control, transformer)


def cosmos_controlnet() -> nn.Module:
    from diffusers.models.controlnets import controlnet_cosmos

    if not hasattr(controlnet_cosmos, "transforms"):
        controlnet_cosmos.transforms = NearestResize
    common = {k: v for k, v in COSMOS.items() if k in ("num_attention_heads", "attention_head_dim", "mlp_ratio", "text_embed_dim", "adaln_lora_dim", "max_size")}
    return controlnet_cosmos.CosmosControlNetModel(n_controlnet_blocks=2, in_channels=7, latent_channels=6, model_channels=48, **{**common, "encoder_hidden_states_channels": 24})


CASES: tuple[Case, ...] = (
    diffusers_case("FluxControlNetModel", flux_control, **FLUX_CONTROL),
    Case("FluxMultiControlNetModel", several("FluxMultiControlNetModel", "FluxControlNetModel", 2, FLUX_CONTROL), lambda d: {**two_flux(d), "return_dict": False}),
    diffusers_case("QwenImageControlNetModel", qwen_control, **QWEN_CONTROL),
    Case("QwenImageMultiControlNetModel", several("QwenImageMultiControlNetModel", "QwenImageControlNetModel", 1, QWEN_CONTROL), lambda d: {**two_qwen(d), "return_dict": False}),
    diffusers_case("SD3ControlNetModel", sd3_control, **SD3),
    Case("SD3MultiControlNetModel", several("SD3MultiControlNetModel", "SD3ControlNetModel", 2, SD3), lambda d: {**two_sd3(d), "return_dict": False}),
    diffusers_case("HunyuanDiT2DControlNetModel", hunyuan_control, **HUNYUAN),
    Case("HunyuanDiT2DMultiControlNetModel", several("HunyuanDiT2DMultiControlNetModel", "HunyuanDiT2DControlNetModel", 2, HUNYUAN), lambda d: {**two_hunyuan(d), "return_dict": False}),
    diffusers_case("SanaControlNetModel", sana_control, **SANA),
    Case("ZImageControlNetModel", z_controlnet, z_control),
    Case("CosmosControlNetModel", cosmos_controlnet, lambda d: {**cosmos_control(d), "return_dict": False}),
)
