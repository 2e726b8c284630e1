"""Three small transformers, one per way in which sharding is usually planned by hand.

standard: shard at the first block, gather at the output projection.
rope: the rotary tables come out of a module of their own.
unified: pictures and captions are concatenated inline, inside `forward`, where no hook can reach.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from seqpar.models.family import (
    Config,
    Family,
    Request,
    Sampler,
    image_ids,
    latent_grid,
)


class Block(nn.Module):
    """Pre-norm self-attention and MLP; rotary tables and a key mask are optional."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BSC: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, S, C]; tables two [S, D] or [B, S, D]; mask broadcastable to [B, H, S, S], true = attend."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(self.norm_attention(x_BSC)).chunk(3, dim=-1)
        )
        if tables is not None:
            q, k = apply_rope(q, tables), apply_rope(k, tables)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x_BSC = x_BSC + self.to_out(attended.transpose(1, 2).flatten(2))
        return x_BSC + self.mlp(self.norm_mlp(x_BSC))


def apply_rope(x_BHSD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates neighbouring pairs of D; tables [S, D] or [B, S, D]."""
    cos, sin = (table.unsqueeze(-3) for table in tables)
    even, odd = x_BHSD.unflatten(-1, (-1, 2)).unbind(-1)
    return (x_BHSD * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin).type_as(x_BHSD)


class RotaryTables(nn.Module):
    """ids [..., 3] -> cos and sin [..., D]; D is divided among the three coordinates as evenly as pairs allow."""

    def __init__(self, head_dim: int, theta: float = 10_000.0) -> None:
        super().__init__()
        pairs = head_dim // 2
        self.pairs = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        self.theta = theta

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = []
        for axis, pairs in enumerate(self.pairs):
            steps = torch.arange(pairs, dtype=torch.float64, device=ids.device) / pairs
            angles.append(ids[..., axis, None].double() * self.theta**-steps)
        both = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
        return both.cos().float(), both.sin().float()


class StandardTransformer(nn.Module):
    """[B, channels, height, width] -> the same: patches, a timestep, blocks, projection, unpatching."""

    def __init__(self, channels: int, width: int, heads: int, num_layers: int, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.patch_embed = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.time_embed = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, patch * patch * channels)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x_BSC = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)
        x_BSC = x_BSC + self.time_embed(timestep[:, None].to(x_BSC.dtype)).unsqueeze(1)
        for block in self.blocks:
            x_BSC = block(x_BSC)
        out = self.proj_out(self.norm_out(x_BSC))
        rows, columns = (size // self.patch for size in hidden_states.shape[2:])
        out = out.reshape(out.shape[0], rows, columns, self.patch, self.patch, -1)
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class RopeTransformer(nn.Module):
    """[B, S, channels] and ids [S, 3] -> [B, S, channels]."""

    def __init__(self, channels: int, width: int, heads: int, num_layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.rope = RotaryTables(width // heads)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, channels)

    def forward(self, hidden_states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x_BSC = self.embed(hidden_states)
        tables = self.rope(ids)
        for block in self.blocks:
            x_BSC = block(x_BSC, tables)
        return self.proj_out(self.norm_out(x_BSC))


class UnifiedTransformer(nn.Module):
    """Lists of pictures [S_i, channels] with ids [S_i, 3] and captions [T_i, text width] -> list of [S_i, channels]."""

    def __init__(self, channels: int, text_width: int, width: int, heads: int, num_layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.embed_text = nn.Linear(text_width, width)
        self.rope = RotaryTables(width // heads)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, channels)

    def forward(self, x: list[torch.Tensor], ids: list[torch.Tensor], cap_feats: list[torch.Tensor]) -> list[torch.Tensor]:
        joint = [torch.cat([self.embed(image), self.embed_text(text)], dim=0) for image, text in zip(x, cap_feats, strict=True)]
        positions = [torch.cat([own, own.new_zeros(text.shape[0], 3)], dim=0) for own, text in zip(ids, cap_feats, strict=True)]
        lengths = [one.shape[0] for one in joint]
        unified = pad_sequence(joint, batch_first=True)
        tables = self.rope(pad_sequence(positions, batch_first=True))
        mask = None
        if min(lengths) != max(lengths):
            filled = [torch.ones(length, dtype=torch.bool, device=unified.device) for length in lengths]
            mask = pad_sequence(filled, batch_first=True)[:, None, None, :]
        for block in self.blocks:
            unified = block(unified, tables, mask)
        out = self.proj_out(self.norm_out(unified))
        return [out[index, : image.shape[0]] for index, image in enumerate(x)]


def _sizes(heads: int, layers: int) -> Config:
    return {"channels": 8, "width": 16 * heads, "heads": heads, "num_layers": layers}


def _standard_inputs(config: Config, request: Request) -> dict[str, Any]:
    sample = Sampler(request)
    _, height, width = latent_grid(request, pixels=8)
    return {
        "hidden_states": sample.normal(request.batch, config["channels"], height, width),
        "timestep": sample.place(torch.full((request.batch,), 0.7)),
    }


def _rope_inputs(config: Config, request: Request) -> dict[str, Any]:
    sample = Sampler(request)
    _, rows, columns = latent_grid(request, pixels=16)
    return {"hidden_states": sample.normal(request.batch, rows * columns, config["channels"]), "ids": sample.place(image_ids(rows, columns))}


def _unified_inputs(config: Config, request: Request) -> dict[str, Any]:
    """The last caption is `pad_text` shorter, which makes the model pad and mask it."""
    sample = Sampler(request)
    _, rows, columns = latent_grid(request, pixels=16)
    lengths = [request.text_len] * (request.batch - 1) + [request.text_len - request.pad_text]
    ids = sample.place(image_ids(rows, columns, modality=1, start=1))
    return {
        "x": [sample.normal(rows * columns, config["channels"]) for _ in lengths],
        "ids": [ids for _ in lengths],
        "cap_feats": [sample.normal(length, config["text_width"]) for length in lengths],
    }


_BIG = {"channels": 16, "width": 1024, "heads": 16, "num_layers": 24}
_NATIVE = {"height": 1024, "width": 1024, "text_len": 128}

STANDARD = Family(
    name="pattern-standard",
    construct=lambda config: StandardTransformer(**config),
    shrink=_sizes,
    full=_BIG,
    inputs=_standard_inputs,
    native=_NATIVE,
    takes_return_dict=False,
)

ROPE = Family(
    name="pattern-rope",
    construct=lambda config: RopeTransformer(**config),
    shrink=_sizes,
    full=_BIG,
    inputs=_rope_inputs,
    native=_NATIVE,
    takes_return_dict=False,
)

UNIFIED = Family(
    name="pattern-unified",
    construct=lambda config: UnifiedTransformer(**config),
    shrink=lambda heads, layers: {**_sizes(heads, layers), "text_width": 32},
    full={**_BIG, "text_width": 768},
    inputs=_unified_inputs,
    native=_NATIVE,
    takes_return_dict=False,
)
