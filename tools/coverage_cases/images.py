"""Transformers that make pictures from text: cross attention, or joint attention with adaptive norms."""

from typing import Any

import torch

from seqpar.tools.coverage_cases.case import Case, Draw, diffusers_case


def dit(d: Draw) -> dict[str, Any]:
    """The model takes square pictures only."""
    side = 2 * d.pick(4, 5, 32)
    return {"hidden_states": d.normal(d.batch, 4, side, side), "timestep": d.steps(), "class_labels": d.integers(10, d.batch)}


def pixart(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.image(4, 2), "encoder_hidden_states": d.words(24), "timestep": d.steps(), "encoder_attention_mask": d.mask()}


def prior(d: Draw) -> dict[str, Any]:
    """The number of text tokens is part of the configuration."""
    return {"hidden_states": d.normal(d.batch, 16), "timestep": d.steps(), "proj_embedding": d.normal(d.batch, 16), "encoder_hidden_states": d.words(16, 60)}


def aura(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.image(4, 2), "encoder_hidden_states": d.words(24), "timestep": d.times()}


def sized(d: Draw) -> dict[str, Any]:
    """The SDXL-like size conditions of CogView."""
    size = torch.tensor([[64.0, 64.0]]).repeat(d.batch, 1)
    return {
        "hidden_states": d.image(4, 2),
        "encoder_hidden_states": d.words(24),
        "timestep": d.steps(),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(d.batch, 2),
    }


def glm(d: Draw) -> dict[str, Any]:
    inputs = {**sized(d), "prior_token_id": d.integers(32, d.batch, d.tokens), "prior_token_drop": torch.zeros(d.batch, d.tokens, dtype=torch.bool)}
    del inputs["original_size"]
    return inputs


def hunyuan(d: Draw) -> dict[str, Any]:
    cos = d.normal(d.tokens, 8)
    return {
        "hidden_states": d.image(4, 2),
        "timestep": d.times(),
        "encoder_hidden_states": d.words(24, 4),
        "text_embedding_mask": d.mask(4),
        "encoder_hidden_states_t5": d.words(16, 5),
        "text_embedding_mask_t5": d.mask(5),
        "image_meta_size": d.uniform(2 * d.batch, 6)[: d.batch],
        "style": d.integers(1, d.batch),
        "image_rotary_emb": (cos.cos(), cos.sin()),
    }


def lumina_next(d: Draw) -> dict[str, Any]:
    angles = d.normal(384, 384, 4)
    return {
        "hidden_states": d.image(4, 2),
        "timestep": d.times(),
        "encoder_hidden_states": d.words(24),
        "encoder_mask": d.mask(),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def lumina2(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.image(4, 2), "timestep": d.times(), "encoder_hidden_states": d.words(24), "encoder_attention_mask": d.mask()}


def sana(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.image(4), "encoder_hidden_states": d.words(24), "timestep": d.steps(), "encoder_attention_mask": d.mask()}


def sd3(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.image(4, 2), "encoder_hidden_states": d.words(24), "pooled_projections": d.normal(d.batch, 20), "timestep": d.steps()}


def ernie(d: Draw) -> dict[str, Any]:
    lengths = torch.full((d.batch,), d.text)
    lengths[-1] -= 2
    return {"hidden_states": d.image(16), "timestep": d.times(), "text_bth": d.words(24), "text_lens": lengths}


def prx(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.image(4, 2), "timestep": d.times(), "encoder_hidden_states": d.words(24), "attention_mask": d.mask()}


def z_image(d: Draw) -> dict[str, Any]:
    return {"x": [d.normal(4, 1, 2 * d.rows, 2 * d.cols) for _ in range(d.batch)], "t": d.times(), "cap_feats": [d.normal(d.text + 3 * i, 24) for i in range(d.batch)]}


def fibo2(d: Draw) -> dict[str, Any]:
    """Text in two layers: one for the perceiver that pools it, one to inject."""
    return {"hidden_states": d.image(4, 2), "timestep": d.times(), "encoder_hidden_states": d.normal(d.batch, 2, d.text, 24)}


def fibo2_mask(d: Draw) -> dict[str, Any]:
    """The number of pooled text tokens is read from the mask."""
    return {**fibo2(d), "encoder_attention_mask": d.mask()}


def transformer_2d(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.image(32), "encoder_hidden_states": d.words(24)}


FIBO2: dict[str, Any] = {"in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "cap_feat_dim": 24, "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 64, "axes_dims": (4, 4, 4), "axes_lens": (64, 64, 64)}

CASES: tuple[Case, ...] = (
    diffusers_case("DiTTransformer2DModel", dit, num_attention_heads=4, attention_head_dim=8, num_layers=2, norm_num_groups=4, sample_size=8, num_embeds_ada_norm=10),
    diffusers_case("PixArtTransformer2DModel", pixart, num_attention_heads=4, attention_head_dim=8, num_layers=2, cross_attention_dim=32, caption_channels=24, sample_size=8, use_additional_conditions=False),
    diffusers_case("PriorTransformer", prior, num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=60),
    diffusers_case("AuraFlowTransformer2DModel", aura, sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32, pos_embed_max_size=1024),
    diffusers_case("CogView3PlusTransformer2DModel", sized, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, text_embed_dim=24, time_embed_dim=16, condition_dim=4, pos_embed_max_size=32, sample_size=8),
    diffusers_case("CogView4Transformer2DModel", sized, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, text_embed_dim=24, time_embed_dim=16, condition_dim=4, sample_size=8, rope_axes_dim=(32, 32)),
    diffusers_case("GlmImageTransformer2DModel", glm, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, text_embed_dim=24, time_embed_dim=16, condition_dim=4, prior_vq_quantizer_codebook_size=32),
    diffusers_case("HunyuanDiT2DModel", hunyuan, num_attention_heads=4, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=2, cross_attention_dim=24, cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=4, text_len_t5=5, use_style_cond_and_image_meta_size=True),
    diffusers_case("LuminaNextDiT2DModel", lumina_next, sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2, multiple_of=16, cross_attention_dim=24),
    diffusers_case("Lumina2Transformer2DModel", lumina2, sample_size=8, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(64, 64, 64), cap_feat_dim=24),
    diffusers_case("SanaTransformer2DModel", sana, in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2, num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=24, sample_size=8),
    diffusers_case("SD3Transformer2DModel", sd3, sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=64),
    diffusers_case("SD3Transformer2DModel@3.5", sd3, sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=64, dual_attention_layers=(0,), qk_norm="rms_norm"),
    diffusers_case("ErnieImageTransformer2DModel", ernie, hidden_size=48, num_attention_heads=4, num_layers=2, ffn_hidden_size=64, in_channels=16, out_channels=16, text_in_dim=24, rope_axes_dim=(4, 4, 4)),
    diffusers_case("PRXTransformer2DModel", prx, in_channels=4, context_in_dim=24, hidden_size=32, num_heads=4, depth=2, axes_dim=[4, 4]),
    diffusers_case("ZImageTransformer2DModel", z_image, in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=24, axes_dims=[4, 4, 4], axes_lens=[1100, 64, 64]),
    diffusers_case("BriaFibo2Transformer2DModel", fibo2, **FIBO2),
    diffusers_case("BriaFibo2Transformer2DModel@mask", fibo2_mask, **FIBO2),
    diffusers_case("Transformer2DModel", transformer_2d, num_attention_heads=4, attention_head_dim=8, in_channels=32, num_layers=1, norm_num_groups=4, cross_attention_dim=24),
    diffusers_case("DreamLiteTransformer2DModel", transformer_2d, num_attention_heads=4, attention_head_dim=8, in_channels=32, num_layers=1, norm_num_groups=4, cross_attention_dim=24),
)
