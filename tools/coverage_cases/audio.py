"""Transformers over sound, alone or beside video: sequences that are no grid of image tokens."""

from typing import Any

import torch

from seqpar.tools.coverage_cases.case import Case, Draw, diffusers_case


def ace_step(d: Draw) -> dict[str, Any]:
    length = 2 * d.tokens
    return {
        "hidden_states": d.normal(d.batch, length, 8),
        "timestep": d.times(),
        "timestep_r": d.times(0.1),
        "encoder_hidden_states": d.words(24),
        "context_latents": d.normal(d.batch, length, 16),
    }


def longcat_audio(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(d.batch, d.tokens, 8),
        "encoder_hidden_states": d.words(24),
        "encoder_attention_mask": d.mask(),
        "timestep": d.times(),
        "attention_mask": d.mask(d.tokens),
        "latent_cond": d.normal(d.batch, d.tokens, 8),
    }


def music(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.normal(d.batch, 6, d.tokens), "timestep": d.times(), "encoder_hidden_states": d.normal(d.batch, d.tokens, 24)}


def depth_codes(d: Draw) -> dict[str, Any]:
    """At most 16 codes, whatever the length of the music."""
    return {"inputs_embeds": d.normal(d.batch, d.pick(8, 7, 16), 32)}


def stable_audio(d: Draw) -> dict[str, Any]:
    angles = d.normal(d.tokens + 1, 8)
    return {
        "hidden_states": d.normal(d.batch, 4, d.tokens),
        "timestep": d.times(),
        "encoder_hidden_states": d.words(24),
        "global_hidden_states": d.normal(d.batch, 1, 20),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


def stable_audio3(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(d.batch, 4, d.tokens),
        "timestep": d.times(),
        "encoder_hidden_states": d.words(24),
        "global_hidden_states": d.normal(d.batch, 20),
        "encoder_attention_mask": d.mask(),
        "local_add_cond": d.normal(d.batch, 5, d.tokens),
    }


def t5_film(d: Draw) -> dict[str, Any]:
    encodings = [(d.normal(d.batch, d.text, 32), d.mask(dtype=torch.float32)), (d.normal(d.batch, d.text + 3, 32), d.mask(d.text + 3, torch.float32))]
    return {"encodings_and_masks": encodings, "decoder_input_tokens": d.normal(d.batch, d.tokens, 8), "decoder_noise_time": d.times()}


def ltx2(d: Draw) -> dict[str, Any]:
    tokens = d.frames * d.video_rows * d.video_cols
    sounds = d.pick(12, 9, 64)
    return {
        "hidden_states": d.normal(d.batch, tokens, 8),
        "audio_hidden_states": d.normal(d.batch, sounds, 4),
        "encoder_hidden_states": d.words(24),
        "audio_encoder_hidden_states": d.words(24),
        "timestep": d.uniform(d.batch, tokens) * 900,
        "audio_timestep": d.uniform(d.batch, sounds) * 900,
        "encoder_attention_mask": d.mask(dtype=torch.long),
        "audio_encoder_attention_mask": d.mask(dtype=torch.long),
        "num_frames": d.frames,
        "height": d.video_rows,
        "width": d.video_cols,
        "fps": 25.0,
        "audio_num_frames": sounds,
    }


def kandinsky6(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.video(4).permute(0, 2, 3, 4, 1).contiguous(),
        "encoder_hidden_states": d.words(24),
        "pooled_projections": d.normal(d.batch, 20),
        "timestep": d.times(1000.0),
        "audio_hidden_states": d.normal(d.batch, d.pick(12, 9, 64), 6),
        "encoder_attention_mask": d.mask(),
    }


def minimax(d: Draw) -> dict[str, Any]:
    """One packed sequence: text, sound, picture."""
    sounds, tokens = d.pick(4, 5, 64), d.tokens
    total = d.text + sounds + tokens
    tags = torch.cat([torch.zeros(d.text), torch.full((sounds,), 2.0), torch.ones(tokens)]).long()
    return {
        "hidden_states": d.normal(1, tokens, 16),
        "audio_hidden_states": d.normal(1, sounds, 6),
        "encoder_hidden_states": d.normal(1, d.text, 24),
        "timestep": d.times(1000.0, 2),
        "timestep_indices": torch.cat([torch.zeros(d.text), torch.ones(sounds + tokens)]).long(),
        "token_tags": tags,
        "position_ids": torch.arange(total)[:, None].repeat(1, 3).float(),
        "video_indices": torch.arange(d.text + sounds, total),
        "audio_indices": torch.arange(d.text, d.text + sounds),
        "text_indices": torch.arange(d.text),
    }


STABLE3: dict[str, Any] = {"io_channels": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "cond_token_dim": 24, "global_cond_dim": 20, "local_add_cond_dim": 5, "timestep_features_dim": 16, "num_memory_tokens": 3}
LTX2: dict[str, Any] = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4,
    "audio_num_attention_heads": 4, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": 24,
}

CASES: tuple[Case, ...] = (
    diffusers_case("AceStepTransformer1DModel", ace_step, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, in_channels=24, audio_acoustic_hidden_dim=8, sliding_window=4, encoder_hidden_size=24),
    diffusers_case("LongCatAudioDiTTransformer", longcat_audio, dit_dim=32, dit_depth=2, dit_heads=4, dit_text_dim=24, latent_dim=8),
    diffusers_case("MiniMaxMusic3Transformer1DModel", music, in_channels=6, condition_dim=24, num_layers=2, num_attention_heads=4, attention_head_dim=8, ff_inner_dim=48, rotary_dim=4, fourier_embedding_dim=16),
    diffusers_case("MiniMaxMusic3RVQDepthDecoder", depth_codes, returns_dict=False, hidden_size=32, num_layers=2, num_attention_heads=4, intermediate_size=48, audio_vocab_size=16, max_position_embeddings=16),
    diffusers_case("MiniMaxH3Transformer3DModel", minimax, num_attention_heads=4, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=48, in_channels=4, audio_in_channels=6, text_dim=24, freq_dim=16, time_embed_hidden_dim=32, time_embed_dim=16, rope_freq_dim=2),
    diffusers_case("StableAudioDiTModel", stable_audio, sample_size=16, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=32, time_proj_dim=16, global_states_input_dim=20, cross_attention_input_dim=24),
    diffusers_case("StableAudio3DiTModel", stable_audio3, use_differential_attention=False, **STABLE3),
    diffusers_case("StableAudio3DiTModel@diff", stable_audio3, use_differential_attention=True, **STABLE3),
    diffusers_case("T5FilmDecoder", t5_film, returns_dict=False, input_dims=8, targets_length=1024, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48),
    diffusers_case("LTX2VideoTransformer3DModel", ltx2, **LTX2),
    diffusers_case("Kandinsky6Transformer3DModel", kandinsky6, in_visual_dim=4, out_visual_dim=4, in_text_dim=24, in_text_dim2=20, time_dim=16, model_dim=32, ff_dim=48, num_text_blocks=1, num_visual_blocks=2, axes_dims=(2, 2, 4), visual_cond=False, in_audio_dim=6, out_audio_dim=6, model_dim_a=32, time_dim_a=16, ff_dim_a=48, axes_dims_a=(2, 2, 4)),
)
