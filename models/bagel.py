"""BAGEL's denoiser: a mixture of two transformers that share one attention, reading a prompt from a KV cache.

Tokens of text and of understood pictures ("und") and noisy latents ("gen") have weights of their own everywhere
(norms, projections, q/k norms, MLPs) and meet in the attention only. One denoising step packs, per picture,
`[<start of image>, latents ..., <end of image>]`: the two markers are und tokens, every token of the picture has the
same rotary position, and all of them attend to the cached prompt and to each other without a mask.

Shapes: S packed tokens of all samples, L latents, P cached prompt tokens of all samples, G key/value heads,
D head dim, C model width. Packed tensors have no batch dim.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from seqpar.models.bagel_layers import (
    Attention,
    BagelConfig,
    IndexPacking,
    MixtureLayer,
    Packing,
    RMSNorm,
    RunPacking,
    TextOnly,
)
from seqpar.models.family import Config, Family, Request, Sampler, latent_grid


class TimestepEmbedder(nn.Module):
    """Timesteps [L] in [0, 1] -> [L, C]."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.first = nn.Linear(frequencies, width)
        self.second = nn.Linear(width, width)
        self.pairs = frequencies // 2

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(self.pairs, dtype=torch.float32, device=timestep.device) / self.pairs
        angles = timestep[:, None].float() * torch.exp(-math.log(10_000.0) * steps)
        wave = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.second(F.silu(self.first(wave.to(self.first.weight.dtype))))


def sincos_table(side: int, width: int) -> torch.Tensor:
    """[side * side, width]: sines and cosines of the column in the first half, of the row in the second."""
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column = one_axis.repeat(side, 1)
    row = one_axis.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1).float()


class BagelDenoiser(nn.Module):
    """Predicts the velocity of noisy latents given a cached prompt; `prefill` makes the cache."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.vae2llm = nn.Linear(config.patch_channels, config.width)
        self.time_embedder = TimestepEmbedder(config.width)
        self.latent_pos_embed = nn.Parameter(sincos_table(config.max_latent_side, config.width), requires_grad=False)
        self.layers = nn.ModuleList(MixtureLayer(config) for _ in range(config.num_layers))
        self.norm_und = RMSNorm(config.width, config.norm_eps)
        self.norm_gen = RMSNorm(config.width, config.norm_eps)
        self.llm2vae = nn.Linear(config.width, config.patch_channels)

    def forward(
        self,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        packed_vae_position_ids: torch.Tensor,
        packed_text_ids: torch.Tensor,
        packed_position_ids: torch.Tensor,
        image_lens: Sequence[int],
        key_values_lens: Sequence[int],
        past_keys: Sequence[torch.Tensor],
        past_values: Sequence[torch.Tensor],
        packed_text_indexes: torch.Tensor | None = None,
        packed_vae_token_indexes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One denoising step of one picture per sample.

        x_t [L, patch channels] noisy latents; timestep [L] in [0, 1]; packed_vae_position_ids [L] = row *
        max_latent_side + column; packed_text_ids [2 * samples] start and end markers; packed_position_ids [S] rotary
        positions; image_lens and key_values_lens: latents and cached tokens per sample; past_keys and past_values: one
        [P, G, D] per layer, samples one after the other. With index tensors, tokens are routed by them.
        Returns the velocity [L, patch channels].
        """
        packing: Packing
        if packed_text_indexes is None or packed_vae_token_indexes is None:
            packing = RunPacking(marker_runs(image_lens))
        else:
            packing = IndexPacking(packed_text_indexes, packed_vae_token_indexes)
        attention = Attention([length + 2 for length in image_lens], key_values_lens)
        past = list(zip(past_keys, past_values, strict=True))
        und, gen = self.embed_tokens(packed_text_ids), self._embed_latents(x_t, timestep, packed_vae_position_ids)
        return self._run(und, gen, packed_position_ids, packing, attention, past)[0]

    def denoise_uncached(self, prompt_ids: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor, packed_vae_position_ids: torch.Tensor, marker_ids: torch.Tensor) -> torch.Tensor:
        """The same step for one sample without a cache: [prompt | start, latents, end] in one masked sequence.

        The prompt is causal, the picture sees everything; prompt_ids [P], marker_ids [2]. Returns [L, patch channels].
        """
        prompt, total = prompt_ids.shape[0], prompt_ids.shape[0] + x_t.shape[0] + 2
        mask = torch.ones(total, total, dtype=torch.bool, device=x_t.device).tril()
        mask[prompt:] = True
        positions = torch.arange(total, device=x_t.device).clamp(max=prompt)
        und = self.embed_tokens(torch.cat([prompt_ids, marker_ids]))
        gen = self._embed_latents(x_t, timestep, packed_vae_position_ids)
        packing = RunPacking((prompt + 1, x_t.shape[0], 1))
        return self._run(und, gen, positions, packing, Attention([total], [0], mask=mask), None)[0]

    def prefill(
        self,
        embeddings: torch.Tensor,
        position_ids: torch.Tensor,
        token_lens: Sequence[int],
        *,
        causal: bool = True,
        past: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        past_lens: Sequence[int] | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values [S, G, D] per layer of und tokens: a prompt (causal) or a picture's ViT tokens (not causal).

        embeddings [S, C] (`embed_tokens(ids)`, or projected ViT features), position_ids [S]; `past` is what they may
        attend to beside themselves and is not repeated in the result.
        """
        attention = Attention(token_lens, past_lens or [0] * len(token_lens), causal=causal)
        return self._run(embeddings, embeddings[:0], position_ids, TextOnly(), attention, past)[1:]

    def _embed_latents(self, x_t: torch.Tensor, timestep: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.vae2llm(x_t) + self.time_embedder(timestep) + self.latent_pos_embed[position_ids]

    def _rope_tables(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [S, 1, D] in float32."""
        half = self.config.head_dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=position_ids.device) / half
        angles = position_ids[:, None].float() * self.config.rope_theta**-exponents
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return angles.cos(), angles.sin()

    def _run(
        self, und: torch.Tensor, gen: torch.Tensor, position_ids: torch.Tensor, packing: Packing, attention: Attention, past: list[tuple[torch.Tensor, torch.Tensor]] | None
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        tables = self._rope_tables(position_ids)
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            und, gen, key, value = layer(und, gen, tables, packing, attention, past[index] if past else None)
            keys.append(key)
            values.append(value)
        # The markers' final states predict no latents: only the gen stream is projected back.
        return self.llm2vae(self.norm_gen(gen)), keys, values


def marker_runs(image_lens: Sequence[int]) -> tuple[int, ...]:
    """Run lengths of [start, latents, end] per sample; neighbouring markers of two samples form one run."""
    runs = [1]
    for length in image_lens:
        runs += [length, 2]
    return (*runs[:-1], 1)


def token_indexes(image_lens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same order as index tensors: markers [2 * samples] and latents [L]."""
    markers: list[int] = []
    latents: list[int] = []
    start = 0
    for length in image_lens:
        markers += [start, start + length + 1]
        latents += range(start + 1, start + length + 1)
        start += length + 2
    return torch.tensor(markers), torch.tensor(latents)


def _construct(config: Config) -> nn.Module:
    return BagelDenoiser(BagelConfig(**config))


def _shrink(heads: int, layers: int) -> Config:
    """Two query heads per key/value head, or one key/value head in all when `heads` is odd."""
    return {
        "width": 16 * heads,
        "mlp_width": 48 * heads,
        "num_layers": layers,
        "heads": heads,
        "kv_heads": heads // 2 if heads % 2 == 0 else 1,
        "vocabulary": 64,
        "latent_channels": 4,
    }


def _inputs(config: Config, request: Request) -> dict[str, Any]:
    """Latents of `batch` pictures, each with a cached prompt of `text_len` tokens (the last one `pad_text` shorter)."""
    sizes, sample = BagelConfig(**config), Sampler(request)
    _, rows, columns = latent_grid(request, pixels=8 * sizes.latent_patch)
    image_lens = [rows * columns] * request.batch
    prompt_lens = [request.text_len] * (request.batch - 1) + [request.text_len - request.pad_text]
    cells = torch.arange(rows)[:, None] * sizes.max_latent_side + torch.arange(columns)
    positions = [torch.full((image + 2,), prompt) for image, prompt in zip(image_lens, prompt_lens, strict=True)]
    cache = (sum(prompt_lens), sizes.kv_heads, sizes.head_dim)
    markers = torch.tensor([sizes.vocabulary - 2, sizes.vocabulary - 1])
    return {
        "x_t": sample.normal(sum(image_lens), sizes.patch_channels),
        "timestep": sample.place(torch.full((sum(image_lens),), 0.7)),
        "packed_vae_position_ids": sample.place(cells.flatten().repeat(request.batch)),
        "packed_text_ids": sample.place(markers.repeat(request.batch)),
        "packed_position_ids": sample.place(torch.cat(positions)),
        "image_lens": image_lens,
        "key_values_lens": prompt_lens,
        "past_keys": [sample.normal(*cache) for _ in range(sizes.num_layers)],
        "past_values": [sample.normal(*cache) for _ in range(sizes.num_layers)],
    }


FAMILY = Family(
    name="bagel",
    construct=_construct,
    shrink=_shrink,
    full={"num_layers": 28},
    inputs=_inputs,
    native={"height": 1024, "width": 1024, "text_len": 64},
    takes_return_dict=False,
)
