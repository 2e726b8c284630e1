"""Steps of random models that attend: every step keeps the shapes of both streams, so that any sequence of steps is a model.

image [B, S, C], text [B, T, C], text_mask [B, T] (True: a token), extra [B, E, C] (E may equal S or T by chance); `variant` selects a form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionSteps(nn.Module):
    """`self.program` and the weights `q`, `k`, `v`, `o` (one of each per step) are set by the model."""

    def attend(self, i: int, x: Tensor, context: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        p = self.program
        q = F.linear(x, self.q[i]).unflatten(-1, (p.heads, p.head_dim)).transpose(1, 2)
        k, v = (F.linear(context, w).unflatten(-1, (p.kv_heads, p.head_dim)).transpose(1, 2) for w in (self.k[i], self.v[i]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=p.heads != p.kv_heads)
        return F.linear(out.transpose(1, 2).flatten(2), self.o[i])

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])

    def step_self(self, image, text, text_mask, extra, i, variant):
        if variant % 2:
            return image, text + self.attend(i, self.norm(text), self.norm(text))
        return image + self.attend(i, self.norm(image), self.norm(image)), text

    def step_joint(self, image, text, text_mask, extra, i, variant):
        parts = [text, image] if variant % 2 else [image, text]
        x = torch.cat(parts, dim=1)
        x = x + self.attend(i, self.norm(x), self.norm(x))
        a, b = x.split([p.shape[1] for p in parts], dim=1)
        return (b, a) if variant % 2 else (a, b)

    def step_cross(self, image, text, text_mask, extra, i, variant):
        if variant % 3 == 2:
            return image, text + self.attend(i, self.norm(text), self.norm(image))
        mask = None
        if variant % 3 == 1:
            mask = torch.zeros_like(text_mask, dtype=image.dtype).masked_fill(~text_mask, -30.0)[:, None, None, :]
        return image + self.attend(i, self.norm(image), self.norm(text), mask), text

    def step_causal(self, image, text, text_mask, extra, i, variant):
        x = torch.cat([text, image], dim=1) if variant % 2 else image
        x = x + self.attend(i, self.norm(x), self.norm(x), causal=True)
        return (x[:, text.shape[1] :], x[:, : text.shape[1]]) if variant % 2 else (x, text)

    def step_masked(self, image, text, text_mask, extra, i, variant):
        x = torch.cat([text, image], dim=1)
        keep = torch.cat([text_mask, torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)], dim=1)
        mask = keep[:, None, None, :]
        if variant % 4 == 1:
            mask = mask & keep[:, None, :, None]
        elif variant % 4 == 2:
            mask = torch.where(mask & keep[:, None, :, None], 0.0, -30.0).to(image.dtype)
        elif variant % 4 == 3:
            mask = torch.zeros(x.shape[0], self.program.heads, 1, x.shape[1], dtype=x.dtype).masked_fill(~mask, float("-inf"))
        x = x + self.attend(i, self.norm(x), self.norm(x), mask)
        return x[:, text.shape[1] :], x[:, : text.shape[1]]

    def step_window(self, image, text, text_mask, extra, i, variant):
        position = torch.arange(image.shape[1], device=image.device)
        near = (position[:, None] - position[None, :]).abs() <= 2 + variant
        mask = near if variant % 2 else torch.zeros(near.shape, dtype=image.dtype).masked_fill(~near, -30.0)[None, None]
        return image + self.attend(i, self.norm(image), self.norm(image), mask), text

    def heads_of(self, x: Tensor, weight: Tensor, heads: int) -> Tensor:
        return F.linear(x, weight).unflatten(-1, (heads, self.program.head_dim)).transpose(1, 2)

    def step_softmax(self, image, text, text_mask, extra, i, variant):
        """Attention written out: as products, with `baddbmm`, with `einsum`, and over a masked text."""
        p = self.program
        x = self.norm(image)
        context = self.norm(text) if variant % 4 == 3 else x
        q = self.heads_of(x, self.q[i], p.heads)
        k, v = (self.heads_of(context, w, p.kv_heads).repeat_interleave(p.heads // p.kv_heads, dim=1) for w in (self.k[i], self.v[i]))
        scale = p.head_dim**-0.5
        if variant % 4 == 1:
            flat = torch.baddbmm(q.new_zeros(1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
            out = torch.bmm(flat.softmax(-1), v.flatten(0, 1)).unflatten(0, (image.shape[0], p.heads))
        elif variant % 4 == 2:
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
            out = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        else:
            scores = q @ k.transpose(-1, -2) * scale
            if variant % 4 == 3:
                scores = scores.masked_fill(~text_mask[:, None, None, :], -1e4 if variant > 3 else -20.0)
            out = scores.float().softmax(-1).to(v.dtype) @ v
        return image + F.linear(out.transpose(1, 2).flatten(2), self.o[i]), text

    def step_repeat_kv(self, image, text, text_mask, extra, i, variant):
        """Key heads repeated before the attention, by `expand` and `reshape`; some causal, some with the text before the keys only."""
        p = self.program
        x = self.norm(image)
        context = torch.cat([self.norm(text), x], dim=1) if variant % 3 == 2 else x
        k, v = (self.heads_of(context, w, p.kv_heads) for w in (self.k[i], self.v[i]))
        times = p.heads // p.kv_heads
        k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).reshape(t.shape[0], p.heads, t.shape[2], t.shape[3]) for t in (k, v))
        out = F.scaled_dot_product_attention(self.heads_of(x, self.q[i], p.heads), k, v, is_causal=variant % 3 == 1)
        return image + F.linear(out.transpose(1, 2).flatten(2), self.o[i]), text

    def step_packed(self, image, text, text_mask, extra, i, variant):
        """Queries, keys and values out of one matrix."""
        p = self.program
        qkv = F.linear(self.norm(image), torch.cat([self.q[i], self.o[i], self.q[i]]))
        if variant % 2:
            q, k, v = qkv.unflatten(-1, (3, p.heads, p.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (t.unflatten(-1, (p.heads, p.head_dim)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        return image + F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2), text

    def step_length_first(self, image, text, text_mask, extra, i, variant):
        """[S, B, C] tokens and [B * heads, S, D] queries, as in `nn.MultiheadAttention`."""
        p = self.program
        x = self.norm(image).transpose(0, 1)
        length, batch, width = x.shape
        q, k, v = (F.linear(x, w).reshape(length, batch * p.heads, p.head_dim).transpose(0, 1) for w in (self.q[i], self.o[i], self.q[i]))
        out = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(length, batch, width)
        return image + out.transpose(0, 1), text

    def step_extra(self, image, text, text_mask, extra, i, variant):
        """A third sequence whose length may be that of another by chance."""
        if variant % 4 == 0:
            return image + self.attend(i, self.norm(image), extra), text
        if variant % 4 == 1:
            return image + (extra if extra.shape[1] == image.shape[1] else extra.mean(dim=1, keepdim=True)), text
        if variant % 4 == 2:
            return image, text + self.attend(i, self.norm(text), extra)
        x = torch.cat([extra, image], dim=1)
        x = x + self.attend(i, self.norm(x), self.norm(x))
        return x[:, extra.shape[1] :], text

    def step_space_time(self, image, text, text_mask, extra, i, variant):
        """Attention inside frames, and between frames at each place: the other of the two is part of the batch."""
        frames, places = self.rows_and_columns(image.shape[1])
        x = self.norm(image).unflatten(1, (frames, places))
        if variant % 2:
            x = x.transpose(1, 2)
        y = x.flatten(0, 1)
        y = (y + self.attend(i, y, y)).unflatten(0, (image.shape[0], x.shape[1]))
        return image + (y.transpose(1, 2) if variant % 2 else y).flatten(1, 2), text

    def step_blocks(self, image, text, text_mask, extra, i, variant):
        """Attention inside blocks of 2 or 3 neighbours, the last one padded."""
        size = 2 + variant % 2
        length = image.shape[1]
        padded = F.pad(self.norm(image), (0, 0, 0, -length % size))
        y = padded.unflatten(1, (-1, size)).flatten(0, 1)
        y = self.attend(i, y, y).unflatten(0, (image.shape[0], -1)).flatten(1, 2)
        return image + y[:, :length], text

    def step_pooled_token(self, image, text, text_mask, extra, i, variant):
        """The mean of all tokens becomes one more token."""
        x = torch.cat([image.mean(dim=1, keepdim=True), image], dim=1)
        x = x + self.attend(i, self.norm(x), self.norm(x), causal=variant % 2 == 1)
        return x[:, 1:] + (x[:, :1] if variant > 2 else 0), text

    def step_few(self, image, text, text_mask, extra, i, variant):
        """A token or two read both streams."""
        x, few = torch.cat([text, image], dim=1), text[:, : 1 + variant % 2]
        keep = torch.cat([text_mask, torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)], dim=1)[:, None, None, :]
        masks = None, keep, torch.zeros(1, self.program.heads, 1, 1, dtype=x.dtype).masked_fill(~keep, float("-inf"))
        found = self.attend(i, self.norm(few), self.norm(x), masks[variant % 3])
        return image, text + found.sum(dim=1, keepdim=True)

    def step_twice(self, image, text, text_mask, extra, i, variant):
        """Every token twice: one after the other, or all and all again."""
        x = self.norm(image)
        x = torch.stack([x, 0.5 * x], dim=2).flatten(1, 2) if variant % 2 else torch.cat([x, 0.5 * x], dim=1)
        x = x + self.attend(i, x, x)
        first, second = (x[:, ::2], x[:, 1::2]) if variant % 2 else x.chunk(2, dim=1)
        return image + first - second, text

    def step_linear_attention(self, image, text, text_mask, extra, i, variant):
        q, k, v = (F.relu(F.linear(self.norm(image), w)) for w in (self.q[i], self.o[i], self.q[i]))
        state = k.transpose(1, 2) @ v
        total = k.sum(dim=1, keepdim=True)
        return image + 0.1 * (q @ state) / (1 + (q * total).sum(-1, keepdim=True)), text
