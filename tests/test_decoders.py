"""Decoders of pictures, videos and sound: convolutions on rows of pixels or on samples, divided from the latents to the result."""

import functools

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderOobleck,
)
from torch import nn

import seqpar
from seqpar.models.randomise import randomise
from seqpar.partitioner.cost import Machine
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

MOVING_IS_FREE = Machine(1e9, 1e13, latency_s=0.0)  # there is little work in small ones
PICTURE = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 8, "block_out_channels": [16, 32, 32]}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
VIDEO = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}
SOUND = {"encoder_hidden_size": 8, "downsampling_ratios": [2, 3, 4], "channel_multiples": [1, 2, 4], "decoder_channels": 8, "decoder_input_channels": 4}

SMALL = {
    "kl": (functools.partial(AutoencoderKL, **PICTURE, **BLOCKS), (1, 4, 17, 6)),
    "wan": (functools.partial(AutoencoderKLWan, **VIDEO), (1, 4, 2, 17, 6)),
    "qwen-image": (functools.partial(AutoencoderKLQwenImage, **VIDEO), (2, 4, 1, 17, 6)),
    "hunyuan-video": (functools.partial(AutoencoderKLHunyuanVideo, latent_channels=4, layers_per_block=1, norm_num_groups=8, block_out_channels=(16, 16, 32, 32)), (1, 4, 2, 17, 6)),
    "stable-audio": (functools.partial(AutoencoderOobleck, **SOUND), (2, 4, 35)),
}
FULL = {
    "kl": (functools.partial(AutoencoderKL, latent_channels=16, block_out_channels=[128, 256, 512, 512], layers_per_block=2, **{k: v[:1] * 4 for k, v in BLOCKS.items()}), (1, 16, 128, 128)),
    "wan": (AutoencoderKLWan, (1, 16, 2, 60, 104)),
    "qwen-image": (AutoencoderKLQwenImage, (1, 16, 1, 128, 128)),
    "hunyuan-video": (AutoencoderKLHunyuanVideo, (1, 16, 2, 60, 104)),  # repeats edges
    "ltx-video": (AutoencoderKLLTXVideo, (1, 128, 2, 16, 24)),  # no attention
    "stable-audio": (AutoencoderOobleck, (1, 64, 1024)),  # nor here: transposed convolutions
}
# Bytes that the busiest of 4 ranks receives, and calls: one halo per convolution over rows; statistics of group norms are all-reduced.
TRAFFIC: dict[str, dict[str, tuple[int, int]]] = {
    "kl": {"all_to_all": (32505856, 32), "all_gather": (34603008, 2), "all_reduce": (10752, 56)},
    "wan": {"all_to_all": (76907520, 66), "all_gather": (32348160, 3)},
    "hunyuan-video": {"all_to_all": (49643520, 32), "all_gather": (56309760, 3), "all_reduce": (10368, 54)},
    "ltx-video": {"all_to_all": (29556736, 43), "all_gather": (31850496, 1)},
    "qwen-image": {"all_to_all": (59424768, 33), "all_gather": (28311552, 2)},
    "stable-audio": {"all_to_all": (675328, 22), "all_gather": (12582912, 1)},
}


class Decoder(nn.Module):
    """Latents [B, C, (F,) H, W] -> pixels, or [B, C, T] -> samples."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents):
        return self.autoencoder.decode(latents, return_dict=False)[0]


@functools.cache
def small(name):
    torch.manual_seed(0)
    build, shape = SMALL[name]
    return trace(Decoder(randomise(build()).eval()), (torch.randn(shape),), {}, dynamic=False)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("name", SMALL)
def test_equals_one_process(name, mesh):
    report = verify_traced(small(name), ulysses=mesh[0], ring=mesh[1], machine=MOVING_IS_FREE)
    assert report.ok, report
    assert report.plan.sharded_flop_fraction > 0.9, report.plan.explain()


@pytest.mark.parametrize("name", FULL)
def test_published_sizes_are_divided_and_traffic_is_pinned(name):
    build, shape = FULL[name]
    with torch.device("meta"):
        plan = seqpar.plan(Decoder(build().eval()), (torch.empty(shape),), ulysses=4)
    assert plan.sharded_flop_fraction > 0.998 and max(plan.flops_per_rank) < 1.01 / 4 * plan.flops_total, plan.explain()
    assert {kind: (plan.comm_bytes_per_rank[kind], calls) for kind, calls in plan.comm_calls.items() if calls} == TRAFFIC[name]


def decoder_in_its_place():
    torch.manual_seed(0)
    vae, latents = randomise(AutoencoderKL(**PICTURE, **BLOCKS)).eval(), torch.randn(1, 4, 21, 16)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        vae.decoder = seqpar.sp_compile(vae.decoder, (latents,), ulysses=2, ring=2)
        found = [vae.decode(latents).sample for _ in range(2)]
    return [((one - expected).norm() / expected.norm()).item() for one in found], expected.std().item(), vae.decoder.plan.sharded_flop_fraction


def test_a_decoder_on_real_ranks(ranks):
    for errors, spread, fraction in ranks.run(decoder_in_its_place):
        assert max(errors) < 1e-5 and spread > 0.01 and 0 < fraction <= 1
