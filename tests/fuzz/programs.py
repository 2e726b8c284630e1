"""Random attention models, described by plain data so that a failing one can be printed and shrunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Program:
    """A model on an image stream [B, image, C] and a text stream [B, text, C].

    steps: (name, number) pairs executed in order; `number` selects a variant of the step.
    """

    image: int
    text: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    steps: tuple[tuple[str, int], ...]
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


STEPS = (
    "self", "joint", "cross", "causal", "masked", "padded", "mlp", "modulate", "rope", "conv1x1", "flatten", "pool", "swap",
    "slice", "table", "grid", "softmax", "window", "scan", "where", "stack", "expand", "einsum", "gather", "linear_attention",
)  # fmt: skip


class RandomModel(nn.Module):
    """Interprets a `Program`. Every step keeps both streams' shapes, so any sequence of steps is a model."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        generator = torch.Generator().manual_seed(program.seed)
        width, kv = program.width, program.kv_heads * program.head_dim

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) / columns**0.5)

        self.q = nn.ParameterList([matrix(width, width) for _ in program.steps])
        self.k = nn.ParameterList([matrix(kv, width) for _ in program.steps])
        self.v = nn.ParameterList([matrix(kv, width) for _ in program.steps])
        self.o = nn.ParameterList([matrix(width, width) for _ in program.steps])
        self.position = nn.Parameter(torch.randn(1, program.image, width, generator=generator) / 2)

    def forward(self, image: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        for i, (name, variant) in enumerate(self.program.steps):
            image, text = getattr(self, "step_" + name)(image, text, text_mask, i, variant)
        return image, text

    # -- attention -------------------------------------------------------------------------------
    def attend(self, i: int, x: Tensor, context: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        p = self.program
        q = F.linear(x, self.q[i]).unflatten(-1, (p.heads, p.head_dim)).transpose(1, 2)
        k, v = (F.linear(context, w).unflatten(-1, (p.kv_heads, p.head_dim)).transpose(1, 2) for w in (self.k[i], self.v[i]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=p.heads != p.kv_heads)
        return F.linear(out.transpose(1, 2).flatten(2), self.o[i])

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])

    def step_self(self, image, text, text_mask, i, variant):
        if variant % 2:
            return image, text + self.attend(i, self.norm(text), self.norm(text))
        return image + self.attend(i, self.norm(image), self.norm(image)), text

    def step_joint(self, image, text, text_mask, i, variant):
        parts = [text, image] if variant % 2 else [image, text]
        x = torch.cat(parts, dim=1)
        x = x + self.attend(i, self.norm(x), self.norm(x))
        a, b = x.split([p.shape[1] for p in parts], dim=1)
        return (b, a) if variant % 2 else (a, b)

    def step_cross(self, image, text, text_mask, i, variant):
        if variant % 3 == 2:
            return image, text + self.attend(i, self.norm(text), self.norm(image))
        mask = None
        if variant % 3 == 1:
            mask = torch.zeros_like(text_mask, dtype=image.dtype).masked_fill(~text_mask, -30.0)[:, None, None, :]
        return image + self.attend(i, self.norm(image), self.norm(text), mask), text

    def step_causal(self, image, text, text_mask, i, variant):
        x = torch.cat([text, image], dim=1) if variant % 2 else image
        x = x + self.attend(i, self.norm(x), self.norm(x), causal=True)
        return (x[:, text.shape[1] :], x[:, : text.shape[1]]) if variant % 2 else (x, text)

    def step_masked(self, image, text, text_mask, i, variant):
        x = torch.cat([text, image], dim=1)
        keep = torch.cat([text_mask, torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)], dim=1)
        mask = keep[:, None, None, :]
        if variant % 4 == 1:
            mask = mask & keep[:, None, :, None]
        elif variant % 4 == 2:
            mask = torch.where(mask & keep[:, None, :, None], 0.0, -30.0)
        elif variant % 4 == 3:
            mask = torch.zeros(x.shape[0], self.program.heads, 1, x.shape[1]).masked_fill(~mask, float("-inf"))
        x = x + self.attend(i, self.norm(x), self.norm(x), mask)
        return x[:, text.shape[1] :], x[:, : text.shape[1]]

    def step_window(self, image, text, text_mask, i, variant):
        position = torch.arange(image.shape[1], device=image.device)
        near = (position[:, None] - position[None, :]).abs() <= 2 + variant
        mask = near if variant % 2 else torch.zeros(near.shape).masked_fill(~near, -30.0)[None, None]
        return image + self.attend(i, self.norm(image), self.norm(image), mask), text

    def step_softmax(self, image, text, text_mask, i, variant):
        """Attention written out."""
        p = self.program
        x = self.norm(image)
        q = F.linear(x, self.q[i]).unflatten(-1, (p.heads, p.head_dim)).transpose(1, 2)
        k, v = (F.linear(x, w).unflatten(-1, (p.kv_heads, p.head_dim)).transpose(1, 2) for w in (self.k[i], self.v[i]))
        k, v = (t.repeat_interleave(p.heads // p.kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * p.head_dim**-0.5
        out = (scores.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return image + F.linear(out, self.o[i]), text

    def step_linear_attention(self, image, text, text_mask, i, variant):
        q, k, v = (F.relu(F.linear(self.norm(image), w)) for w in (self.q[i], self.o[i], self.q[i]))
        state = k.transpose(1, 2) @ v
        total = k.sum(dim=1, keepdim=True)
        return image + 0.1 * (q @ state) / (1 + (q * total).sum(-1, keepdim=True)), text

    # -- everything else ---------------------------------------------------------------------------
    def step_mlp(self, image, text, text_mask, i, variant):
        return image + F.linear(F.gelu(F.linear(self.norm(image), self.q[i])), self.o[i]), text + F.linear(F.silu(text), self.o[i])

    def step_modulate(self, image, text, text_mask, i, variant):
        scale = F.linear((image if variant % 2 else text).mean(dim=1), self.q[i])
        shift, gate = scale[:, None].chunk(2, dim=-1)
        return self.norm(image) * (1 + torch.cat([gate, shift], -1)) + image, text

    def step_rope(self, image, text, text_mask, i, variant):
        x = torch.cat([text, image], dim=1)
        ids = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        angle = torch.outer(ids, 1.0 / 100 ** (torch.arange(x.shape[-1] // 2) / x.shape[-1]))
        if variant % 2:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            x = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(2)
        else:
            a, b = x.chunk(2, dim=-1)
            x = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)
        return x[:, text.shape[1] :], x[:, : text.shape[1]]

    def step_table(self, image, text, text_mask, i, variant):
        if variant % 2:
            return image + self.position[:, torch.arange(image.shape[1])], text
        return image + self.position, text

    def step_padded(self, image, text, text_mask, i, variant):
        padded = F.pad(image, (0, 0, variant % 3, 2))
        padded = padded + self.attend(i, self.norm(padded), self.norm(padded))
        return padded[:, variant % 3 : variant % 3 + image.shape[1]], text

    def step_conv1x1(self, image, text, text_mask, i, variant):
        return image + F.conv1d(image.transpose(1, 2), self.q[i][..., None]).transpose(1, 2), text

    def step_flatten(self, image, text, text_mask, i, variant):
        tokens = image.reshape(-1, image.shape[-1])
        return image + F.linear(F.gelu(tokens), self.q[i]).view(image.shape), text

    def step_pool(self, image, text, text_mask, i, variant):
        pooled = image.amax(dim=1, keepdim=True) if variant % 2 else image.sum(dim=1, keepdim=True) / 10
        return image + self.norm(pooled), text + pooled

    def step_swap(self, image, text, text_mask, i, variant):
        return image.transpose(0, 1).contiguous().sigmoid().transpose(0, 1), text.flip(-1)

    def step_slice(self, image, text, text_mask, i, variant):
        if image.shape[1] < 3:
            return image, text
        first, rest = image[:, :1], image[:, 1:]
        return torch.cat([first * 2, rest.tanh()], dim=1), text

    def step_grid(self, image, text, text_mask, i, variant):
        length = image.shape[1]
        rows = max(d for d in range(1, length + 1) if length % d == 0 and d * d <= length)
        grid = image.unflatten(1, (rows, length // rows))
        return (grid * (1 + torch.arange(rows, device=image.device)[None, :, None, None] / rows)).flatten(1, 2), text

    def step_scan(self, image, text, text_mask, i, variant):
        return image + image.cumsum(dim=1) / image.shape[1], text

    def step_where(self, image, text, text_mask, i, variant):
        return torch.where(image > 0, image, 0.3 * image), text * text_mask[..., None]

    def step_stack(self, image, text, text_mask, i, variant):
        a, b = torch.stack([image, 0.5 * image], dim=variant % 3).unbind(variant % 3)
        return a - b, text

    def step_expand(self, image, text, text_mask, i, variant):
        copies = image[:, None].expand(-1, 2, -1, -1) if variant % 2 else image[:, :, None].repeat(1, 1, 2, 1).transpose(1, 2)
        return copies.mean(dim=1), text

    def step_einsum(self, image, text, text_mask, i, variant):
        return image + torch.einsum("bsc,dc->bsd", self.norm(image), self.q[i]), text

    def step_gather(self, image, text, text_mask, i, variant):
        order = torch.arange(image.shape[1] - 1, -1, -1, device=image.device)
        return image + 0.5 * image[:, order], text


def inputs(program: Program) -> tuple[Tensor, Tensor, Tensor]:
    """image, text, and a text mask in which the last element has padding (where text is long enough)."""
    generator = torch.Generator().manual_seed(program.seed + 1)
    image = torch.randn(program.batch, program.image, program.width, generator=generator)
    text = torch.randn(program.batch, program.text, program.width, generator=generator)
    mask = torch.ones(program.batch, program.text, dtype=torch.bool)
    if program.text > 1:
        mask[-1, -(program.text // 2) :] = False
    return image, text, mask
