"""Steps of random models besides attention; see `attention_steps`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class TokenSteps(nn.Module):
    """`self.program`, `self.position` and the weights are set by the model."""

    def rows_and_columns(self, length: int) -> tuple[int, int]:
        rows = max(d for d in range(1, length + 1) if length % d == 0 and d * d <= length)
        return rows, length // rows

    def step_mlp(self, image, text, text_mask, extra, i, variant):
        return image + F.linear(F.gelu(F.linear(self.norm(image), self.q[i])), self.o[i]), text + F.linear(F.silu(text), self.o[i])

    def step_modulate(self, image, text, text_mask, extra, i, variant):
        scale = F.linear((image if variant % 2 else text).mean(dim=1), self.q[i])
        shift, gate = scale[:, None].chunk(2, dim=-1)
        return self.norm(image) * (1 + torch.cat([gate, shift], -1)) + image, text

    def step_rope(self, image, text, text_mask, extra, i, variant):
        x = torch.cat([text, image], dim=1).float()
        ids = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        angle = torch.outer(ids, 1.0 / 100 ** (torch.arange(x.shape[-1] // 2) / x.shape[-1]))
        if variant % 2:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            x = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(2)
        else:
            a, b = x.chunk(2, dim=-1)
            x = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)
        x = x.to(image.dtype)
        return x[:, text.shape[1] :], x[:, : text.shape[1]]

    def step_table(self, image, text, text_mask, extra, i, variant):
        if variant % 2:
            return image + self.position[:, torch.arange(image.shape[1])], text
        return image + self.position, text

    def step_padded(self, image, text, text_mask, extra, i, variant):
        padded = F.pad(image, (0, 0, variant % 3, 2))
        padded = padded + self.attend(i, self.norm(padded), self.norm(padded))
        return padded[:, variant % 3 : variant % 3 + image.shape[1]], text

    def step_conv1x1(self, image, text, text_mask, extra, i, variant):
        return image + F.conv1d(image.transpose(1, 2), self.q[i][..., None]).transpose(1, 2), text

    def step_flatten(self, image, text, text_mask, extra, i, variant):
        tokens = image.reshape(-1, image.shape[-1])
        return image + F.linear(F.gelu(tokens), self.q[i]).view(image.shape), text

    def step_pool(self, image, text, text_mask, extra, i, variant):
        pooled = image.amax(dim=1, keepdim=True) if variant % 2 else image.sum(dim=1, keepdim=True) / 10
        return image + self.norm(pooled), text + pooled

    def step_swap(self, image, text, text_mask, extra, i, variant):
        return image.transpose(0, 1).contiguous().sigmoid().transpose(0, 1), text.flip(-1)

    def step_slice(self, image, text, text_mask, extra, i, variant):
        if image.shape[1] < 3:
            return image, text
        first, rest = image[:, :1], image[:, 1:]
        return torch.cat([first * 2, rest.tanh()], dim=1), text

    def step_grid(self, image, text, text_mask, extra, i, variant):
        rows, columns = self.rows_and_columns(image.shape[1])
        grid = image.unflatten(1, (rows, columns))
        return (grid * (1 + torch.arange(rows, device=image.device, dtype=image.dtype)[None, :, None, None] / rows)).flatten(1, 2), text

    def step_scan(self, image, text, text_mask, extra, i, variant):
        return image + image.cumsum(dim=1) / image.shape[1], text

    def step_where(self, image, text, text_mask, extra, i, variant):
        return torch.where(image > 0, image, 0.3 * image), text * text_mask[..., None]

    def step_stack(self, image, text, text_mask, extra, i, variant):
        a, b = torch.stack([image, 0.5 * image], dim=variant % 3).unbind(variant % 3)
        return a - b, text

    def step_expand(self, image, text, text_mask, extra, i, variant):
        copies = image[:, None].expand(-1, 2, -1, -1) if variant % 2 else image[:, :, None].repeat(1, 1, 2, 1).transpose(1, 2)
        return copies.mean(dim=1), text

    def step_einsum(self, image, text, text_mask, extra, i, variant):
        return image + torch.einsum("bsc,dc->bsd", self.norm(image), self.q[i]), text

    def step_gather(self, image, text, text_mask, extra, i, variant):
        order = torch.arange(image.shape[1] - 1, -1, -1, device=image.device)
        return image + 0.5 * image[:, order], text

    def step_conv(self, image, text, text_mask, extra, i, variant):
        """A depthwise convolution over the tokens: wide, dilated, or causal."""
        x = self.norm(image).transpose(1, 2)
        weight = self.q[i][:, None, :3]
        if variant % 3 == 2:
            return image + F.conv1d(F.pad(x, (2, 0)), weight, groups=x.shape[1]).transpose(1, 2), text
        dilation = 1 + variant % 3
        return image + F.conv1d(x, weight, padding=dilation, dilation=dilation, groups=x.shape[1]).transpose(1, 2), text

    def step_conv2d(self, image, text, text_mask, extra, i, variant):
        """A convolution over the tokens laid out as rows and columns."""
        rows, columns = self.rows_and_columns(image.shape[1])
        grid = self.norm(image).transpose(1, 2).unflatten(2, (rows, columns))
        size = 3 if variant % 2 else 1
        weight = self.q[i][:, :size, None].expand(-1, -1, 3)[:, None]
        return image + F.conv2d(grid, weight, padding=(size // 2, 1), groups=grid.shape[1]).flatten(2).transpose(1, 2), text

    def step_index(self, image, text, text_mask, extra, i, variant):
        length = image.shape[1]
        order = (torch.arange(length, device=image.device) * 3 + variant) % length
        if variant % 4 == 0:
            return image + 0.5 * image.index_select(1, order), text
        if variant % 4 == 1:
            return image + 0.5 * torch.gather(image, 1, order[None, :, None].expand(image.shape)), text
        if variant % 4 == 2:
            return image + F.embedding(order % text.shape[1], text[0]), text
        return image, text + image[:, torch.arange(text.shape[1], device=image.device) % length]

    def step_write(self, image, text, text_mask, extra, i, variant):
        """Writes into ranges, steps and places of a copy."""
        y = image.clone()
        half, common = image.shape[1] // 2, min(image.shape[1], text.shape[1])
        if variant == 0:
            y[:, half:] *= 2
        elif variant == 1 and half:
            y[:, :half] = image[:, half : 2 * half]
        elif variant == 2:
            y[:, ::2] += 1
        elif variant == 3:
            y[..., :1].fill_(0.5)
            y.mul_(0.5)
        elif variant == 4:
            y[:, :common] = text[:, :common]
        else:
            y[:, torch.arange(half, device=image.device)] = 0.25
        return y, text

    def step_masked_mean(self, image, text, text_mask, extra, i, variant):
        weight = text_mask[..., None].to(text.dtype)
        mean = (text * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
        return image + F.linear(mean, self.q[i]), text - mean if variant % 2 else text

    def step_statistics(self, image, text, text_mask, extra, i, variant):
        """Normalised over the tokens, in several ways."""
        if variant % 3 == 0:
            return image + F.group_norm(image.transpose(1, 2), self.program.heads).transpose(1, 2), text
        if variant % 3 == 1:
            return image + (image - image.mean(1, keepdim=True)) * torch.rsqrt(image.var(1, keepdim=True, unbiased=False) + 1e-3), text
        weights = F.linear(image, self.q[i][:1]).softmax(dim=1)
        return image + (weights * image).sum(dim=1, keepdim=True), text

    def step_rms(self, image, text, text_mask, extra, i, variant):
        x = image.float()
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(image.dtype) * self.q[i][0], F.normalize(text, dim=-1)

    def step_roll(self, image, text, text_mask, extra, i, variant):
        return image + 0.5 * (image.flip(1) if variant % 2 else image.roll(1 + variant, dims=1)), text

    def step_pairs(self, image, text, text_mask, extra, i, variant):
        """A value per pair of tokens, with the tokens in two dims of it."""
        pairs = torch.tanh(image[:, :, None, :2] - image[:, None, :, :2]).mean(-1)
        return image + (pairs @ image / image.shape[1] if variant % 2 else pairs.mean(dim=2)[..., None]), text

    def step_downsample(self, image, text, text_mask, extra, i, variant):
        """Neighbours averaged, and copied back."""
        length = image.shape[1]
        if length % 2:
            return image, text
        half = image.unflatten(1, (length // 2, 2)).mean(dim=2)
        return image + F.gelu(half).repeat_interleave(2, dim=1), text
