"""Picture transformers with packed, masked, routed or many-part sequences."""

from typing import Any

import torch

from seqpar.tools.coverage_cases.case import Case, Draw, diffusers_case


def hidream(d: Draw) -> dict[str, Any]:
    side = 2 * d.pick(4, 5, 32)
    return {
        "hidden_states": d.normal(d.batch, 4, side, side),
        "timesteps": d.times(1000.0),
        "encoder_hidden_states_t5": d.words(24),
        "encoder_hidden_states_llama3": d.normal(2, d.batch, d.text, 24),
        "pooled_embeds": d.normal(d.batch, 20),
    }


def hunyuan_image(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.image(4), "timestep": d.times(1000.0), "encoder_hidden_states": d.words(24), "encoder_attention_mask": d.mask()}


def two_encoders(d: Draw) -> dict[str, Any]:
    return {**hunyuan_image(d), "encoder_hidden_states_2": d.words(20, d.text + 1), "encoder_attention_mask_2": d.mask(d.text + 1)}


def ideogram(d: Draw) -> dict[str, Any]:
    """Text and image tokens in one sequence; role 3 is text, 2 the picture; the last sample ends with padding of its own segment."""
    length = d.text + d.tokens
    indicator = torch.cat([torch.full((d.text,), 3), torch.full((d.tokens,), 2)]).repeat(d.batch, 1)
    segments = torch.ones(d.batch, length, dtype=torch.long)
    segments[-1, -1] = 2
    return {
        "hidden_states": d.normal(d.batch, length, 16),
        "timestep": d.times(),
        "encoder_hidden_states": d.normal(d.batch, length, 24),
        "position_ids": torch.cat([torch.zeros(d.text, 3), d.grid_ids()]).long().repeat(d.batch, 1, 1),
        "segment_ids": segments,
        "indicator": indicator,
    }


def joy(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.video(4), "timestep": d.times(1000.0), "encoder_hidden_states": d.words(24)}


def joy_plus(d: Draw) -> dict[str, Any]:
    """A reference picture of 2 x 2 tokens before the picture itself."""
    return {
        "hidden_states": d.normal(d.batch, 4 + d.tokens, 4, 1, 2, 2),
        "timestep": d.times(1000.0),
        "encoder_hidden_states": d.words(24),
        "encoder_hidden_states_mask": d.mask(dtype=torch.float32),
        "shape_list": [[(1, 2, 2), (1, d.rows, d.cols)]] * d.batch,
    }


def omnigen(d: Draw) -> dict[str, Any]:
    length = d.text + 1 + d.tokens
    mask = torch.ones(d.batch, length, length)
    mask[:, : d.text, : d.text] = torch.ones(d.text, d.text).tril()
    mask[:, : d.text, d.text :] = 0
    return {
        "hidden_states": d.image(4, 2),
        "timestep": d.times(),
        "input_ids": d.integers(50, d.batch, d.text),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(length).repeat(d.batch, 1),
    }


def qwen21(d: Draw) -> dict[str, Any]:
    """One slot of the text sequence stands for four image tokens."""
    rows, cols = d.pick((4, 4), (3, 4), (32, 32))
    slots = rows * cols // 4
    return {
        "hidden_states": d.normal(1, rows * cols, 16),
        "encoder_hidden_states": d.normal(1, d.text, 24),
        "timestep": d.times(1.0, 1),
        "img_shapes": [[(1, rows, cols)]],
        "img_mask": torch.cat([torch.zeros(1, d.text), torch.ones(1, slots)], dim=1).bool(),
        "encoder_hidden_states_mask": torch.ones(1, d.text, dtype=torch.bool),
    }


def protein(d: Draw) -> dict[str, Any]:
    """Every token has a pair with every other: length is kept small."""
    length = d.pick(16, 13, 64)
    mask = d.mask(length)
    return {
        "bb_ca": d.normal(d.batch, length, 3),
        "local_latents": d.normal(d.batch, length, 4),
        "bb_ca_time": d.times(),
        "local_latents_time": d.times(),
        "padding_mask": mask,
        "token_type": d.integers(3, d.batch, length),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(d.batch, length, dtype=torch.bool),
            "supports_local_latent": torch.ones(d.batch, length, dtype=torch.bool),
            "token_bond_path_length": d.integers(8, d.batch, length, length),
        },
    }


def cosmos3(d: Draw) -> dict[str, Any]:
    """Text before the picture; the picture's frames are all noisy."""
    frames, tokens = 2, 2 * d.tokens
    total = d.text + tokens
    video = torch.arange(d.text, total)
    return {
        "input_ids": d.integers(50, d.text),
        "text_indexes": torch.arange(d.text),
        "position_ids": torch.arange(total).repeat(3, 1),
        "und_len": d.text,
        "sequence_length": total,
        "vision_tokens": [d.normal(1, 4, frames, 2 * d.rows, 2 * d.cols)],
        "vision_token_shapes": [(frames, d.rows, d.cols)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
    }


HUNYUAN: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 24, "rope_axes_dim": (4, 4)}
JOY: dict[str, Any] = {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 4, "text_dim": 24, "num_layers": 2, "rope_dim_list": [2, 2, 4]}
PROTEIN: dict[str, Any] = {
    "nlayers": 2, "token_dim": 32, "nheads": 4, "dim_cond": 16, "pair_repr_dim": 12, "latent_dim": 4, "token_type_emb_dim": 8, "t_emb_dim": 8, "seq_sep_dim": 8, "xt_pair_dist_dim": 6,
    "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"), "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
    "feats_pair_repr": ("xt_bb_ca_pair_dists", "token_bond_path_length"), "feats_pair_cond": ("time_emb_bb_ca",), "tri_mult_c": 8, "num_sequence_classes": 10,
}

CASES: tuple[Case, ...] = (
    diffusers_case("HiDreamImageTransformer2DModel", hidream, patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4, caption_channels=[24, 24], text_emb_dim=20, axes_dims_rope=(8, 4, 4), max_resolution=(64, 64), llama_layers=[0, 1], force_inference_output=True),
    diffusers_case("HunyuanImageTransformer2DModel", two_encoders, text_embed_2_dim=20, **HUNYUAN),
    diffusers_case("HunyuanImageTransformer2DModel@1enc", hunyuan_image, **HUNYUAN),
    diffusers_case("Ideogram4Transformer2DModel", ideogram, in_channels=16, num_layers=2, attention_head_dim=12, num_attention_heads=4, intermediate_size=48, adaln_dim=16, llm_features_dim=24, mrope_section=(2, 2, 2)),
    diffusers_case("JoyImageEditTransformer3DModel", joy, **JOY),
    diffusers_case("JoyImageEditPlusTransformer3DModel", joy_plus, **JOY),
    diffusers_case("OmniGenTransformer2DModel", omnigen, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48, num_layers=2, pad_token_id=0, vocab_size=50, rope_scaling={"type": "su", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}, time_step_dim=16),
    diffusers_case("QwenImage21Transformer2DModel", qwen21, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, context_in_dim=24, axes_dims_rope=(2, 2, 4)),
    diffusers_case("RFD4ProteinaTransformer", protein, **PROTEIN),
    diffusers_case("Cosmos3OmniTransformer", cosmos3, dtype="float32", head_dim=12, hidden_size=48, intermediate_size=48, latent_channel=4, num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, patch_latent_dim=16, vocab_size=50, rope_axes_dim=[2, 2, 2]),
)
