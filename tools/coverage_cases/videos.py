"""Transformers over frames x rows x columns with cross attention to text, in the manner of Wan, and their neighbours."""

from typing import Any

import torch
from torch import nn

from seqpar.tools.coverage_cases.case import Case, Draw, diffusers_case, rotary

WAN: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 64}


def wan(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.video(4), "timestep": d.steps(), "encoder_hidden_states": d.words(24)}


def wan_i2v(d: Draw) -> dict[str, Any]:
    """Image tokens come first and 512 text tokens after them, as the attention processor counts on."""
    return {"hidden_states": d.video(4), "timestep": d.steps(), "encoder_hidden_states": d.words(24, 512), "encoder_hidden_states_image": d.words(20, 6)}


def wan_ti2v(d: Draw) -> dict[str, Any]:
    """A time step of its own for every token."""
    tokens = d.frames * d.video_rows * d.video_cols
    return {**wan(d), "timestep": d.uniform(d.batch, tokens) * 900}


def vace(d: Draw) -> dict[str, Any]:
    return {**wan(d), "control_hidden_states": d.video(6), "control_hidden_states_scale": torch.tensor([1.0, 0.7])}


def anyflow(d: Draw) -> dict[str, Any]:
    hidden = d.video(4).transpose(1, 2).contiguous()
    time = d.times(1000.0)[:, None].repeat(1, d.frames)
    return {"hidden_states": hidden, "timestep": time, "r_timestep": time * 0.5, "encoder_hidden_states": d.words(24)}


def allegro(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.video(4), "timestep": d.steps(), "encoder_hidden_states": d.words(24), "encoder_attention_mask": d.mask(dtype=torch.long)}


def latte(d: Draw) -> dict[str, Any]:
    """The number of frames is part of the configuration."""
    return {"hidden_states": d.normal(d.batch, 4, 4, 2 * d.video_rows, 2 * d.video_cols), "timestep": d.steps(), "encoder_hidden_states": d.words(24)}


def cogvideox(d: Draw) -> dict[str, Any]:
    hidden = d.video(4, patch_t=d.pick(1, 1, 1)).transpose(1, 2).contiguous()
    return {"hidden_states": hidden, "timestep": d.steps(), "encoder_hidden_states": d.words(24), "image_rotary_emb": rotary(d.frames * d.video_rows * d.video_cols, 16)}


def cogvideox15(d: Draw) -> dict[str, Any]:
    hidden = d.video(4, patch_t=2).transpose(1, 2).contiguous()
    return {"hidden_states": hidden, "timestep": d.steps(), "encoder_hidden_states": d.words(24), "image_rotary_emb": rotary(d.frames * d.video_rows * d.video_cols, 16)}


def cosmos(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.video(4),
        "timestep": d.times(),
        "encoder_hidden_states": d.words(24),
        "attention_mask": d.mask(),
        "fps": 16,
    }


class NearestResize:
    """What diffusers uses of torchvision.transforms here, for machines without torchvision."""

    class InterpolationMode:
        NEAREST = "nearest"

    class functional:
        @staticmethod
        def resize(x: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
            return nn.functional.interpolate(x, size, mode=interpolation)


def cosmos_v2w(d: Draw) -> dict[str, Any]:
    """The first frame is given: its time step is zero, and a mask says so."""
    given = torch.zeros(d.batch, 1, d.frames, 1, 1)
    given[:, :, :1] = 1
    rows, cols = 2 * d.video_rows, 2 * d.video_cols
    return {
        **cosmos(d),
        "timestep": d.times()[:, None, None, None, None] * (1 - given),
        "condition_mask": given.repeat(1, 1, 1, rows, cols),
        "padding_mask": torch.zeros(1, 1, rows, cols),
    }


def cosmos_model(name: str, **config: Any) -> Any:
    def construct() -> nn.Module:
        from diffusers.models.transformers import transformer_cosmos

        if not hasattr(transformer_cosmos, "transforms"):
            transformer_cosmos.transforms = NearestResize
        return getattr(transformer_cosmos, name)(**config)

    return construct


def easyanimate(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.video(4), "timestep": d.times(), "encoder_hidden_states": d.words(24)}


def ltx(d: Draw) -> dict[str, Any]:
    tokens = d.frames * d.video_rows * d.video_cols
    return {
        "hidden_states": d.normal(d.batch, tokens, 8),
        "encoder_hidden_states": d.words(24),
        "timestep": d.steps(),
        "encoder_attention_mask": d.mask(dtype=torch.long),
        "num_frames": d.frames,
        "height": d.video_rows,
        "width": d.video_cols,
    }


def sana_video(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.video(4), "timestep": d.steps(), "encoder_hidden_states": d.words(24), "encoder_attention_mask": d.mask()}


def mochi(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.video(4), "timestep": d.steps(), "encoder_hidden_states": d.words(24), "encoder_attention_mask": d.mask()}


def hunyuan_video(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.video(4),
        "timestep": d.steps(),
        "encoder_hidden_states": d.words(24),
        "encoder_attention_mask": d.mask(dtype=torch.long),
        "pooled_projections": d.normal(d.batch, 20),
        "guidance": d.times(6000.0),
    }


def hunyuan_i2v(d: Draw) -> dict[str, Any]:
    inputs = hunyuan_video(d)
    del inputs["guidance"]
    return inputs


def kandinsky5(d: Draw) -> dict[str, Any]:
    hidden = d.video(4).permute(0, 2, 3, 4, 1).contiguous()
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": d.words(24),
        "timestep": d.times(1000.0),
        "pooled_projections": d.normal(d.batch, 20),
        "visual_rope_pos": [torch.arange(d.frames), torch.arange(d.video_rows), torch.arange(d.video_cols)],
        "text_rope_pos": torch.arange(d.text),
    }


def motif(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.video(9), "timestep": d.steps(), "encoder_hidden_states": d.words(24), "encoder_attention_mask": d.mask()}


def skyreels(d: Draw) -> dict[str, Any]:
    return wan(d)


HUNYUAN: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 20, "rope_axes_dim": (2, 2, 4)}
COGVIDEO: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 24, "num_layers": 2, "use_rotary_positional_embeddings": True}
COSMOS: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2, "mlp_ratio": 2.0, "text_embed_dim": 24, "adaln_lora_dim": 4, "max_size": (8, 64, 64), "concat_padding_mask": False}

CASES: tuple[Case, ...] = (
    diffusers_case("WanTransformer3DModel", wan, **WAN),
    diffusers_case("WanTransformer3DModel@i2v", wan_i2v, image_dim=20, added_kv_proj_dim=48, **WAN),
    diffusers_case("WanTransformer3DModel@ti2v", wan_ti2v, **WAN),
    diffusers_case("WanVACETransformer3DModel", vace, vace_layers=[0, 1], vace_in_channels=6, **WAN),
    diffusers_case("ChronoEditTransformer3DModel", wan, rope_temporal_skip_len=8, **WAN),
    diffusers_case("SkyReelsV2Transformer3DModel", skyreels, **WAN),
    diffusers_case("AnyFlowTransformer3DModel", anyflow, **WAN),
    diffusers_case("AllegroTransformer3DModel", allegro, num_attention_heads=4, attention_head_dim=8, num_layers=2, cross_attention_dim=32, caption_channels=24, sample_height=8, sample_width=8, sample_frames=2),
    diffusers_case("LatteTransformer3DModel", latte, num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=24, video_length=4),
    diffusers_case("CogVideoXTransformer3DModel", cogvideox, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=8, **COGVIDEO),
    diffusers_case("CogVideoXTransformer3DModel@1.5", cogvideox15, sample_width=8, sample_height=8, sample_frames=5, patch_size_t=2, patch_bias=False, max_text_seq_length=8, **COGVIDEO),
    diffusers_case("CosmosTransformer3DModel", cosmos, **COSMOS),
    Case("CosmosTransformer3DModel@v2w", cosmos_model("CosmosTransformer3DModel", **{**COSMOS, "in_channels": 5, "concat_padding_mask": True}), lambda d: {**cosmos_v2w(d), "return_dict": False}),
    diffusers_case("EasyAnimateTransformer3DModel", easyanimate, num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=8, sample_height=8, num_layers=2, mmdit_layers=1, time_embed_dim=16, text_embed_dim=24),
    diffusers_case("LTXVideoTransformer3DModel", ltx, in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=12, cross_attention_dim=48, num_layers=2, caption_channels=24),
    diffusers_case("SanaVideoTransformer3DModel", sana_video, in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=12, num_layers=2, num_cross_attention_heads=4, cross_attention_head_dim=12, cross_attention_dim=48, caption_channels=24, sample_size=8),
    diffusers_case("MochiTransformer3DModel", mochi, num_attention_heads=4, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=24, time_embed_dim=4, max_sequence_length=8),
    diffusers_case("HunyuanVideoTransformer3DModel", hunyuan_video, **HUNYUAN),
    diffusers_case("HunyuanVideoTransformer3DModel@i2v", hunyuan_i2v, guidance_embeds=False, image_condition_type="latent_concat", **HUNYUAN),
    diffusers_case("HunyuanVideoTransformer3DModel@token_replace", hunyuan_i2v, guidance_embeds=False, image_condition_type="token_replace", **HUNYUAN),
    diffusers_case("Kandinsky5Transformer3DModel", kandinsky5, in_visual_dim=4, out_visual_dim=4, in_text_dim=24, in_text_dim2=20, time_dim=16, model_dim=32, ff_dim=48, num_text_blocks=1, num_visual_blocks=2, axes_dims=(2, 2, 4)),
    diffusers_case("MotifVideoTransformer3DModel", motif, in_channels=9, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1, text_embed_dim=24, rope_axes_dim=(2, 2, 4)),
    diffusers_case("MotifVideoTransformer3DModel@xattn", motif, in_channels=9, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1, text_embed_dim=24, rope_axes_dim=(2, 2, 4), enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True),
)
