"""`seqpar.parallelize` on pipelines that are made of other pipelines (on real ranks: test_pipelines.py)."""

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

import seqpar
from seqpar.errors import UnsupportedError
from seqpar.models.randomise import randomise
from seqpar.models.tokenizers import clip_tokenizer

WIDTH = 32
SIZE = {"num_inference_steps": 1, "prior_num_inference_steps": 2, "output_type": "np"}


def text_encoder(tokenizer):
    return randomise(
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        ), 1,
    )  # fmt: skip


def ready(pipe):
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def kandinsky():
    """Kandinsky 2.2: a prior transformer makes an embedding of the picture, a UNet the picture."""
    from diffusers import DDIMScheduler, KandinskyV22CombinedPipeline, PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, VQModel

    tokenizer = clip_tokenizer()
    vision = CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=16, cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH, encoder_hid_dim_type="image_proj", addition_embed_type="image", resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    movq = VQModel(
        latent_channels=4, vq_embed_dim=4, num_vq_embeddings=12, block_out_channels=(32, 32), norm_num_groups=8, norm_type="spatial",
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"), up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    pipe = KandinskyV22CombinedPipeline(
        unet=randomise(unet, 2),
        scheduler=DDIMScheduler(beta_schedule="linear", steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        movq=randomise(movq, 3),
        prior_prior=randomise(PriorTransformer(num_attention_heads=2, attention_head_dim=16, num_layers=1, embedding_dim=WIDTH), 4),
        prior_image_encoder=randomise(CLIPVisionModelWithProjection(vision), 5),
        prior_text_encoder=text_encoder(tokenizer),
        prior_tokenizer=tokenizer,
        prior_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=10.0),
        prior_image_processor=CLIPImageProcessor(),
    )
    return ready(pipe)


def stable_cascade():
    """Stable Cascade: two UNets of one class, with attention to the text in both."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadeCombinedPipeline, StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    tokenizer = clip_tokenizer()
    shared = {
        "conditioning_dim": WIDTH, "block_out_channels": (16, 16), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
        "timestep_ratio_embedding_dim": 8, "clip_text_pooled_in_channels": WIDTH, "clip_seq": 2,
    }  # fmt: skip
    prior = StableCascadeUNet(**shared, in_channels=16, out_channels=16, clip_text_in_channels=WIDTH, clip_image_in_channels=WIDTH, switch_level=(False,))
    decoder = StableCascadeUNet(**shared, in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=16, pixel_mapper_in_channels=3)
    pipe = StableCascadeCombinedPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(tokenizer),
        decoder=randomise(decoder, 2),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=randomise(PaellaVQModel(levels=2, bottleneck_blocks=1, embed_dim=8), 3),
        prior_prior=randomise(prior, 4),
        prior_text_encoder=text_encoder(tokenizer),
        prior_tokenizer=tokenizer,
        prior_scheduler=DDPMWuerstchenScheduler(),
    )
    return ready(pipe)


def draw(pipe, side):
    return np.asarray(pipe("a cup", generator=torch.Generator().manual_seed(3), width=side, height=side, **SIZE)[0])


@pytest.mark.parametrize(("build", "side", "denoisers"), [(kandinsky, 64, ["prior_prior", "unet"]), (stable_cascade, 96, ["prior_prior", "decoder"])])
def test_undone_everywhere(build, side, denoisers, monkeypatch):
    noted = []
    monkeypatch.setattr("seqpar.pipelines.sp_compile", lambda model, inputs, **_: noted.append(model) or model)
    pipe = build()
    parts = (pipe, pipe.prior_pipe, pipe.decoder_pipe)
    kinds, alone = [type(part) for part in parts], draw(pipe, side)
    handle = seqpar.parallelize(pipe)
    assert np.array_equal(draw(pipe, side), alone)
    assert alone.std() > 0.02 and list(handle.denoisers) == denoisers and noted == [pipe.components[name] for name in denoisers]
    for part in parts[1:]:
        with pytest.raises(UnsupportedError, match="parallelised already"):
            seqpar.parallelize(part)
    parts[2].unparallelize()  # any of them is the way back
    assert [type(part) for part in parts] == kinds and not handle.denoisers
    assert np.array_equal(draw(pipe, side), alone) and len(noted) == 2
    with seqpar.parallelize(parts[1]), pytest.raises(UnsupportedError, match=r"\(prior_pipe\) is parallelised already"):
        seqpar.parallelize(pipe)
