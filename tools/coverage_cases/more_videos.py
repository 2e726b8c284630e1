"""Video transformers with history, faces, sparse or linear attention."""

from typing import Any

import torch

from seqpar.tools.coverage_cases.case import Case, Draw, diffusers_case, rotary
from seqpar.tools.coverage_cases.videos import COGVIDEO, HUNYUAN, WAN, hunyuan_video


def anyflow_far(d: Draw) -> dict[str, Any]:
    hidden = d.video(4).transpose(1, 2).contiguous()
    time = d.times(1000.0)[:, None].repeat(1, d.frames)
    return {"hidden_states": hidden, "timestep": time, "r_timestep": time * 0.5, "encoder_hidden_states": d.words(24), "chunk_partition": [1, d.frames - 1]}


def consisid(d: Draw) -> dict[str, Any]:
    hidden = d.video(4).transpose(1, 2).contiguous()
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": d.words(24),
        "timestep": d.steps(),
        "image_rotary_emb": rotary(d.frames * d.video_rows * d.video_cols, 16),
        "id_cond": d.normal(d.batch, 16),
        "id_vit_hidden": [d.normal(d.batch, 3, 16) for _ in range(2)],
    }


def frame_history(d: Draw, count: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, frame numbers) of `count` earlier frames."""
    latents = d.normal(d.batch, 4, count, 2 * d.video_rows, 2 * d.video_cols)
    return latents, torch.arange(start, start + count).repeat(d.batch, 1)


def helios(d: Draw) -> dict[str, Any]:
    (short, short_at), (mid, mid_at), (long, long_at) = frame_history(d, 2, 6), frame_history(d, 2, 4), frame_history(d, 4, 0)
    return {
        "hidden_states": d.video(4),
        "timestep": d.steps(),
        "encoder_hidden_states": d.words(24),
        "indices_hidden_states": torch.arange(8, 8 + d.frames).repeat(d.batch, 1),
        "indices_latents_history_short": short_at,
        "indices_latents_history_mid": mid_at,
        "indices_latents_history_long": long_at,
        "latents_history_short": short,
        "latents_history_mid": mid,
        "latents_history_long": long,
    }


def framepack(d: Draw) -> dict[str, Any]:
    (clean, clean_at), (half, half_at), (quarter, quarter_at) = frame_history(d, 2, 6), frame_history(d, 2, 4), frame_history(d, 4, 0)
    clean_at, half_at, quarter_at = clean_at[0], half_at[0], quarter_at[0]
    return {
        **hunyuan_video(d),
        "image_embeds": d.normal(d.batch, 3, 16),
        "indices_latents": torch.arange(8, 8 + d.frames),
        "latents_clean": clean,
        "indices_latents_clean": clean_at,
        "latents_history_2x": half,
        "indices_latents_history_2x": half_at,
        "latents_history_4x": quarter,
        "indices_latents_history_4x": quarter_at,
    }


def hunyuan15(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.video(4, patch=1),
        "timestep": d.times(1000.0),
        "encoder_hidden_states": d.words(24),
        "encoder_attention_mask": d.mask(),
        "encoder_hidden_states_2": d.words(20, d.text + 1),
        "encoder_attention_mask_2": d.mask(d.text + 1),
        "image_embeds": torch.zeros(d.batch, 3, 16),
    }


def hunyuan15_i2v(d: Draw) -> dict[str, Any]:
    return {**hunyuan15(d), "image_embeds": d.normal(d.batch, 3, 16)}


def wan_animate(d: Draw) -> dict[str, Any]:
    """One reference frame, then the frames; four pictures of the face per frame."""
    rows, cols = 2 * d.video_rows, 2 * d.video_cols
    return {
        "hidden_states": d.normal(d.batch, 12, d.frames + 1, rows, cols),
        "timestep": d.steps(),
        "encoder_hidden_states": d.words(24),
        "pose_hidden_states": d.normal(d.batch, 4, d.frames, rows, cols),
        "face_pixel_values": d.normal(d.batch, 3, 4 * d.frames, 16, 16),
    }


def wan_animate2(d: Draw) -> dict[str, Any]:
    """The reference pass, which fills the cache."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    tokens = d.frames * d.video_rows * d.video_cols
    shape = (d.frames, 2 * d.video_rows, 2 * d.video_cols)
    return {
        "hidden_states": [d.normal(4, *shape)],
        "timestep": d.times(1000.0, 1),
        "encoder_hidden_states": [d.normal(d.text, 24)],
        "condition_latents": [d.normal(8, *shape)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": tokens,
        "offset_grid_sizes": torch.tensor([[d.frames, d.video_rows, d.video_cols]]),
    }


def wan_animate2_cached(d: Draw) -> dict[str, Any]:
    """A denoising step: the keys and values of the reference are read from the cache."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    inputs, tokens = wan_animate2(d), d.frames * d.video_rows * d.video_cols
    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(d.normal(1, tokens, 4, 12), d.normal(1, tokens, 4, 12))
    del inputs["offset_grid_sizes"]
    return {
        **inputs,
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "reference_grid_sizes": torch.tensor([[d.frames, d.video_rows, d.video_cols]]),
        "origin_len": 4 * (d.frames - 1),
        "origin_area": [16 * d.video_rows, 16 * d.video_cols],
    }


def kandinsky_sr(d: Draw) -> dict[str, Any]:
    """Rows and columns are multiples of the 8 x 8 blocks of its sparse attention."""
    shape = d.pick((2, 8, 8), (3, 8, 16), (4, 16, 16))
    return {"hidden_states": d.normal(d.batch, *shape, 9), "timestep": d.times(1000.0)}


def sana_wm(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.video(4, patch=1),
        "timestep": d.uniform(d.batch, 1, d.frames) * 900,
        "encoder_hidden_states": d.normal(d.batch, 1, d.text, 24),
        "encoder_attention_mask": d.mask(dtype=torch.long),
        "chunk_plucker": d.video(6, patch=1),
    }


def refiner(d: Draw) -> dict[str, Any]:
    tokens = d.frames * d.video_rows * d.video_cols
    angles = d.normal(d.batch, tokens, 32)
    return {
        "hidden_states": d.normal(d.batch, tokens, 8),
        "encoder_hidden_states": d.words(24),
        "timestep": d.uniform(d.batch, tokens) * 900,
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": d.mask(dtype=torch.long),
    }


def temporal(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.normal(d.batch * d.frames, 32, d.video_rows, d.video_cols), "num_frames": d.frames}


HUNYUAN15: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 24, "text_embed_2_dim": 20,
    "image_embed_dim": 16, "rope_axes_dim": (2, 2, 4), "target_size": 16,
}
CONSISID: dict[str, Any] = {
    "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 8, "cross_attn_num_heads": 4, "LFE_id_dim": 16, "LFE_vit_dim": 16, "LFE_depth": 2, "LFE_dim_head": 8, "LFE_num_heads": 4,
    "LFE_num_id_token": 2, "LFE_num_querie": 4, "LFE_output_dim": 42, "LFE_ff_mult": 2, "LFE_num_scale": 2,
}
ANIMATE: dict[str, Any] = {
    "in_channels": 12, "latent_channels": 4, "image_dim": None, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8,
    "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 4, "inject_face_latents_blocks": 1,
}
ANIMATE2: dict[str, Any] = {"text_len": 16, "in_dim": 12, "dim": 48, "ffn_dim": 48, "freq_dim": 16, "text_dim": 24, "out_dim": 4, "num_heads": 4, "num_layers": 2, "use_img_emb": False}

CASES: tuple[Case, ...] = (
    diffusers_case("AnyFlowFARTransformer3DModel", anyflow_far, compressed_patch_size=(1, 4, 4), chunk_partition=(1, 1), **WAN),
    diffusers_case("ConsisIDTransformer3DModel", consisid, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=8, **COGVIDEO, **CONSISID),
    diffusers_case("HeliosTransformer3DModel", helios, rope_dim=(4, 4, 4), **{k: v for k, v in WAN.items() if k != "rope_max_seq_len"}),
    diffusers_case("HunyuanVideoFramepackTransformer3DModel", framepack, image_proj_dim=16, has_image_proj=True, has_clean_x_embedder=True, **HUNYUAN),
    diffusers_case("HunyuanVideo15Transformer3DModel", hunyuan15, task_type="t2v", **HUNYUAN15),
    diffusers_case("HunyuanVideo15Transformer3DModel@i2v", hunyuan15_i2v, task_type="i2v", **HUNYUAN15),
    diffusers_case("WanAnimateTransformer3DModel", wan_animate, **{**WAN, **ANIMATE}),
    diffusers_case("WanAnimate2Transformer3DModel", wan_animate2, **ANIMATE2),
    diffusers_case("WanAnimate2Transformer3DModel@cached", wan_animate2_cached, **ANIMATE2),
    diffusers_case("Kandinsky6SRTransformer3DModel", kandinsky_sr, in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=32, ff_dim=48, num_visual_blocks=2, axes_dims=(2, 2, 4)),
    diffusers_case("SanaWMTransformer3DModel", sana_wm, in_channels=4, num_layers=2, hidden_size=48, num_attention_heads=4, softmax_every_n=2, linear_head_dim=12, chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=2, caption_channels=24, mlp_ratio=2.0),
    diffusers_case("SanaWMLTX2RefinerTransformer3DModel", refiner, in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=4, audio_attention_head_dim=4, audio_cross_attention_dim=16, num_layers=2, caption_channels=24),
    diffusers_case("TransformerTemporalModel", temporal, num_attention_heads=4, attention_head_dim=8, in_channels=32, num_layers=1, norm_num_groups=4),
)
