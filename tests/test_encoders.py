"""Encoders of pictures and videos, and networks that shorten and enlarge: convolutions with strides on rows of pixels, divided from the pixels to the result."""

import functools

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLQwenImage, AutoencoderKLWan, UNet2DConditionModel
from torch import nn

import seqpar
from seqpar.models.randomise import randomise
from seqpar.partitioner.cost import Machine
from seqpar.passes.guards import failed_guard
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import compare, simulate, verify_traced

FREE_CALLS = Machine(call_share=0.0)
PICTURE = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 8, "block_out_channels": [16, 32, 32]}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
VIDEO = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}
NET = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 12, "attention_head_dim": 4}
STAGES = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
HUNYUAN = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 8, "block_out_channels": (16, 16, 32, 32)}


class Encoder(nn.Module):
    """Pixels [B, 3, (F,) H, W] -> mean and deviation of latents."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pixels):
        return self.autoencoder.encode(pixels, return_dict=False)[0].parameters


class Denoiser(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, latents, step, text):
        return self.net(latents, step, text, return_dict=False)[0]


def encoder(build, *shape):
    return Encoder(build()), (torch.randn(shape),)


def denoiser(build, *shape, text):
    return Denoiser(build()), (torch.randn(shape), torch.tensor(500.0), torch.randn(shape[0], *text))


SMALL = {
    "kl": lambda: encoder(functools.partial(AutoencoderKL, **PICTURE, **BLOCKS), 1, 3, 68, 24),
    "wan": lambda: encoder(functools.partial(AutoencoderKLWan, **VIDEO), 1, 3, 5, 68, 24),
    "qwen-image": lambda: encoder(functools.partial(AutoencoderKLQwenImage, **VIDEO), 2, 3, 1, 68, 24),
    "hunyuan-video": lambda: encoder(functools.partial(AutoencoderKLHunyuanVideo, **HUNYUAN), 1, 3, 5, 136, 16),
    "unet": lambda: denoiser(functools.partial(UNet2DConditionModel, **NET, **STAGES), 2, 4, 34, 10, text=(7, 12)),
}
KL = {"latent_channels": 16, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
FULL = {
    "kl": lambda: encoder(functools.partial(AutoencoderKL, **KL, **{k: v[:1] * 4 for k, v in BLOCKS.items()}), 1, 3, 1024, 1024),
    "hunyuan-video": lambda: encoder(AutoencoderKLHunyuanVideo, 1, 3, 5, 480, 832),  # repeats edges
}
# Bytes that the busiest of 4 ranks receives, and calls: one halo per convolution over rows; statistics of group norms are all-reduced.
TRAFFIC: dict[str, dict[str, tuple[int, int]]] = {
    "kl": {"all_to_all": (17825792, 24), "all_gather": (26738688, 2), "all_reduce": (7680, 40)},
    "hunyuan-video": {"all_to_all": (31269120, 25), "all_gather": (39536640, 3), "all_reduce": (7680, 40)},
}


@functools.cache
def small(name):
    torch.manual_seed(0)
    model, inputs = SMALL[name]()
    return trace(randomise(model).eval(), inputs, {}, dynamic=False)


@pytest.mark.parametrize(("name", "mesh"), [("kl", (2, 1)), ("kl", (1, 3)), ("wan", (2, 2)), ("qwen-image", (1, 3)), ("hunyuan-video", (1, 3)), ("unet", (1, 3))])
def test_equals_one_process(name, mesh):
    report = verify_traced(small(name), ulysses=mesh[0], ring=mesh[1], machine=FREE_CALLS)
    assert report.ok, report
    assert report.plan.sharded_flop_fraction > 0.9, report.plan.explain()


@pytest.mark.parametrize("name", FULL)
def test_published_sizes_are_divided_and_traffic_is_pinned(name):
    with torch.device("meta"):
        model, inputs = FULL[name]()
        plan = seqpar.plan(model.eval(), inputs, ulysses=4)
    assert plan.sharded_flop_fraction > 0.994 and max(plan.flops_per_rank) < 1.02 / 4 * plan.flops_total, plan.explain()
    assert {kind: (plan.comm_bytes_per_rank[kind], calls) for kind, calls in plan.comm_calls.items() if calls} == TRAFFIC[name]


def test_one_program_serves_all_heights_that_the_strides_divide():
    torch.manual_seed(0)
    model, inputs = SMALL["kl"]()
    traced = trace(randomise(model).eval(), inputs, {}, dynamic=True)
    partitioned = partition(traced, ulysses=2, machine=FREE_CALLS)
    assert partitioned.plan.sharded_flop_fraction > 0.9 and partitioned.plan.comm_calls["all_gather"] == 2
    for height, width in ((68, 24), (48, 37)):
        pixels = torch.randn(1, 3, height, width)
        assert failed_guard(traced, [pixels.shape], partitioned.conditions) is None
        with torch.no_grad():
            expected = [model(pixels)]
        assert compare(expected, simulate(partitioned, [pixels]))[2]
    for height in (70, 71):
        assert failed_guard(traced, [(1, 3, height, 24)], partitioned.conditions)
