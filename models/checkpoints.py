"""Tiny complete pipelines on disk: every component of the published ones, random weights, no downloads.

A checkpoint is read by `DiffusionPipeline.from_pretrained(folder)` and draws a (meaningless, not constant) picture
on a CPU within seconds.
"""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LongCatImagePipeline,
    QwenImagePipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    ZImagePipeline,
)
from torch import nn

from seqpar.errors import SeqparError
from seqpar.models import registry, text_encoders, tokenizers
from seqpar.models.family import Config
from seqpar.models.randomise import randomise


def checkpoint_names() -> tuple[str, ...]:
    """The names `build_checkpoint` knows."""
    return tuple(_BUILDERS)


def build_checkpoint(name: str, folder: str | Path, *, heads: int = 4, layers: int = 2, seed: int = 0) -> Path:
    """Saves a tiny pipeline of the family `name` in `folder` (created if needed) and returns the folder. As `build_pipeline`."""
    build_pipeline(name, heads=heads, layers=layers, seed=seed).save_pretrained(folder)
    return Path(folder)


def build_pipeline(name: str, *, heads: int = 4, layers: int = 2, seed: int = 0) -> DiffusionPipeline:
    """A tiny pipeline of the family `name`, in memory, ready to draw.

    `heads` and `layers` are those of the transformer. Raises SeqparError for an unknown name.
    """
    if name not in _BUILDERS:
        raise SeqparError(f"no tiny checkpoint called {name!r}; known: {', '.join(_BUILDERS)}")
    family = registry.get(name)
    config = family.tiny_config(heads=heads, layers=layers)
    pipeline = _BUILDERS[name](config, lambda offset: randomise(family.build(config), seed + offset), seed)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


# Gives the family's transformer with random weights; the argument tells several of them apart.
MakeTransformer = Callable[[int], nn.Module]


def _flux(config: Config, transformer: MakeTransformer, seed: int) -> DiffusionPipeline:
    clip, t5 = tokenizers.clip_tokenizer(), tokenizers.t5_tokenizer()
    return FluxPipeline(
        scheduler=_shifting_scheduler(base_shift=0.5, max_shift=1.15),
        vae=_picture_vae(config["in_channels"] // 4, seed),
        text_encoder=text_encoders.clip_encoder(clip, config["pooled_projection_dim"], seed),
        tokenizer=clip,
        text_encoder_2=text_encoders.t5_encoder(t5, config["joint_attention_dim"], seed),
        tokenizer_2=t5,
        transformer=transformer(0),
    )


def _longcat_image(config: Config, transformer: MakeTransformer, seed: int) -> DiffusionPipeline:
    empty = LongCatImagePipeline(*[None] * 6)
    tokenizer = tokenizers.qwen_tokenizer([empty.prompt_template_encode_prefix, empty.prompt_template_encode_suffix])
    return LongCatImagePipeline(
        scheduler=_shifting_scheduler(base_shift=0.5, max_shift=1.15),
        vae=_picture_vae(config["in_channels"] // 4, seed),
        text_encoder=text_encoders.qwen_vl_encoder(tokenizer, config["joint_attention_dim"], seed),
        tokenizer=tokenizer,
        # Only its text half is used; the full processor would need torchvision for pictures it never gets.
        text_processor=tokenizer,
        transformer=transformer(0),
    )


def _qwen_image(config: Config, transformer: MakeTransformer, seed: int) -> DiffusionPipeline:
    empty = QwenImagePipeline(*[None] * 5)
    tokenizer = tokenizers.qwen_tokenizer([empty.prompt_template_encode.format("")])
    vae = AutoencoderKLQwenImage(**_video_vae_sizes(config["out_channels"]))
    return QwenImagePipeline(
        scheduler=_shifting_scheduler(base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, time_shift_type="exponential"),
        vae=randomise(vae, seed),
        text_encoder=text_encoders.qwen_vl_encoder(tokenizer, config["joint_attention_dim"], seed),
        tokenizer=tokenizer,
        transformer=transformer(0),
    )


def _wan(config: Config, transformer: MakeTransformer, seed: int) -> DiffusionPipeline:
    """Wan 2.2 14B: one transformer for the noisy part of the schedule, another for the rest."""
    tokenizer = tokenizers.t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoders.umt5_encoder(tokenizer, config["text_dim"], seed),
        vae=randomise(AutoencoderKLWan(**_video_vae_sizes(config["in_channels"])), seed),
        scheduler=_video_scheduler(shift=3.0),
        transformer=transformer(0),
        transformer_2=transformer(1),
        boundary_ratio=0.875,
    )


def _wan_ti2v(config: Config, transformer: MakeTransformer, seed: int) -> DiffusionPipeline:
    """Wan 2.2 TI2V: one transformer with a timestep per token, and a VAE that works on 16 x 16 pixels."""
    tokenizer = tokenizers.t5_tokenizer()
    sizes = {**_video_vae_sizes(config["in_channels"]), "is_residual": True, "patch_size": 2, "scale_factor_spatial": 16}
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoders.umt5_encoder(tokenizer, config["text_dim"], seed),
        vae=randomise(AutoencoderKLWan(**sizes, in_channels=12, out_channels=12), seed),
        scheduler=_video_scheduler(shift=5.0),
        transformer=transformer(0),
        expand_timesteps=True,
    )


def _z_image(config: Config, transformer: MakeTransformer, seed: int) -> DiffusionPipeline:
    tokenizer = tokenizers.qwen_tokenizer()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=_picture_vae(config["in_channels"], seed),
        text_encoder=text_encoders.qwen3_encoder(tokenizer, config["cap_feat_dim"], seed),
        tokenizer=tokenizer,
        transformer=transformer(0),
    )


def _picture_vae(latent_channels: int, seed: int) -> nn.Module:
    """One latent cell per 8 x 8 pixels."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    return randomise(vae, seed)


def _video_vae_sizes(latent_channels: int) -> Config:
    """One latent cell per 4 frames (the first one alone) and 8 x 8 pixels."""
    return {
        "base_dim": 8,
        "z_dim": latent_channels,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * latent_channels,
        "latents_std": [1.0] * latent_channels,
    }


def _shifting_scheduler(*, base_shift: float, max_shift: float, max_image_seq_len: int = 4096, time_shift_type: str = "exponential") -> FlowMatchEulerDiscreteScheduler:
    """Flow matching whose shift grows with the number of image tokens."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=base_shift,
        max_shift=max_shift,
        base_image_seq_len=256,
        max_image_seq_len=max_image_seq_len,
        time_shift_type=time_shift_type,
    )


def _video_scheduler(*, shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000)


_BUILDERS = MappingProxyType(
    {
        "flux": _flux,
        "qwen-image": _qwen_image,
        "wan": _wan,
        "wan-ti2v": _wan_ti2v,
        "z-image": _z_image,
        "longcat-image": _longcat_image,
    }
)
