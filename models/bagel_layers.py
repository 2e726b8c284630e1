"""The parts of BAGEL's mixture of transformers: packed sequences, experts, the attention they share.

Shapes: S packed tokens of all samples, U und tokens, L latents (gen tokens), H query heads, G key/value heads,
D head dim, C model width. Packed tensors have no batch dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class BagelConfig:
    """Sizes; the defaults are those of BAGEL-7B-MoT. Invariants: heads divide width, kv_heads divide heads."""

    width: int = 3584
    mlp_width: int = 18944
    num_layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    vocabulary: int = 152064
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    latent_channels: int = 16
    latent_patch: int = 2
    max_latent_side: int = 64

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"heads must divide width and kv_heads must divide heads: {self}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_channels(self) -> int:
        return self.latent_channels * self.latent_patch**2


class Packing(Protocol):
    """Where und and gen tokens sit in the packed sequence."""

    def merge(self, und: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
        """[U, ...] and [L, ...] -> [S, ...] in packed order."""

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, ...] -> [U, ...] and [L, ...]; the inverse of `merge`."""


@dataclass(frozen=True)
class RunPacking:
    """The order as alternating run lengths: und, gen, und, gen, ..., und. Structure, not data: a compiler sees it."""

    runs: tuple[int, ...]

    def merge(self, und: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
        und_parts = und.split(list(self.runs[0::2]))
        gen_parts = gen.split(list(self.runs[1::2]))
        parts = [part for pair in zip(und_parts, gen_parts, strict=False) for part in pair]
        return torch.cat([*parts, und_parts[-1]])

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = packed.split(list(self.runs))
        return torch.cat(parts[0::2]), torch.cat(parts[1::2])


@dataclass(frozen=True)
class IndexPacking:
    """The order as index tensors, as in the published code: any order, but only known when running."""

    und_indexes: torch.Tensor
    gen_indexes: torch.Tensor

    def merge(self, und: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
        packed = und.new_zeros((und.shape[0] + gen.shape[0], *und.shape[1:]))
        packed[self.und_indexes] = und
        packed[self.gen_indexes] = gen
        return packed

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return packed[self.und_indexes], packed[self.gen_indexes]


@dataclass(frozen=True)
class TextOnly:
    """Every token is an und token: the prompt's prefill."""

    def merge(self, und: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
        return und

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return packed, packed[:0]


class RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to x's dtype, then scaled."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Expert(nn.Module):
    """One layer's weights for one kind of token."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        kv_width = config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.input_norm = RMSNorm(config.width, config.norm_eps)
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, kv_width)
        self.v_proj = nn.Linear(config.width, kv_width)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config.width, config.mlp_width)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, C] -> q [T, H, D] and k [T, G, D] (float32, normalised) and v [T, G, D]."""
        x = self.input_norm(x)
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        return self.q_norm(q.float()), self.k_norm(k.float()), v

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Both residual branches: x [T, C], attended [T, H * D] -> [T, C]."""
        x = x + self.o_proj(attended)
        return x + self.mlp(self.mlp_norm(x))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [S, heads, D] with tables [S, 1, D]; the two halves of D form the pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@dataclass(frozen=True)
class Attention:
    """How the samples of a packed sequence attend. Invariants: one entry per sample in every list.

    `causal`: each token sees its sample's cache and the tokens up to itself. `mask` [S, S] (only without cache and
    for one sample): true where a query sees a key.
    """

    token_lens: Sequence[int]
    cache_lens: Sequence[int]
    causal: bool = False
    mask: torch.Tensor | None = None

    def __call__(self, q_SHD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """-> [S, H * D]. Keys of a sample are its cached ones, then its own."""
        keys, values = (self._with_cache(new, old) for new, old in zip((k_SGD, v_SGD), past or (None, None), strict=True))
        out = []
        for query, key, value in zip(q_SHD.split(list(self.token_lens)), keys, values, strict=True):
            q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
            mask = self._causal_mask(query.shape[0], key.shape[0], query.device) if self.causal else self.mask
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            out.append(attended.squeeze(0).transpose(0, 1).flatten(1))
        return torch.cat(out)

    def _with_cache(self, new: torch.Tensor, old: torch.Tensor | None) -> list[torch.Tensor]:
        own = new.split(list(self.token_lens))
        if old is None:
            return list(own)
        return [torch.cat(pair) for pair in zip(old.split(list(self.cache_lens)), own, strict=True)]

    @staticmethod
    def _causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class MixtureLayer(nn.Module):
    """A decoder layer with two experts and one attention."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.und = Expert(config)
        self.gen = Expert(config)

    def forward(
        self,
        und: torch.Tensor,
        gen: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        packing: Packing,
        attention: Attention,
        past: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """und [U, C], gen [L, C] -> the same, and this layer's keys and values [S, G, D]."""
        q, k, v = (packing.merge(*pair) for pair in zip(self.und.project(und), self.gen.project(gen), strict=True))
        q, k = rotate(q, *tables).to(v.dtype), rotate(k, *tables).to(v.dtype)
        attended_und, attended_gen = packing.split(attention(q, k, v, past))
        return self.und.finish(und, attended_und), self.gen.finish(gen, attended_gen), k, v
