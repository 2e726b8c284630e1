"""What a coverage case is: how to build a tiny model, and how to draw inputs for it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.models.randomise import randomise

VARIANTS = ("even", "odd", "large")


class Draw:
    """Seeded random inputs of one length variant.

    even: lengths that 2 and 4 ranks divide; odd: lengths they do not, and batch 2; large: at least 1024 tokens, so that
    sequences dominate the work. A video has `frames` frames of `video_rows` x `video_cols` tokens, a picture `rows` x `cols` tokens.
    """

    def __init__(self, variant: str) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
        self.variant = variant
        self.rows, self.cols = self.pick((4, 4), (3, 5), (32, 32))
        self.frames, self.video_rows, self.video_cols = self.pick((2, 4, 4), (3, 3, 5), (4, 16, 16))
        self.text = self.pick(8, 7, 16)
        self.batch = self.pick(1, 2, 1)
        self._generator = torch.Generator("cpu").manual_seed(VARIANTS.index(variant))

    def pick(self, even: Any, odd: Any, large: Any) -> Any:
        """The value for this variant."""
        return {"even": even, "odd": odd, "large": large}[self.variant]

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return self.rows * self.cols

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator)

    def times(self, scale: float = 1.0, count: int | None = None) -> Tensor:
        """[batch] time steps below `scale`."""
        return (self.uniform(self.batch if count is None else count) * 0.8 + 0.1) * scale

    def steps(self, count: int | None = None) -> Tensor:
        """[batch] integer time steps below 1000."""
        return self.times(1000.0, count).long()

    def image(self, channels: int, patch: int = 1) -> Tensor:
        """[batch, channels, rows * patch, cols * patch]"""
        return self.normal(self.batch, channels, self.rows * patch, self.cols * patch)

    def video(self, channels: int, patch: int = 2, patch_t: int = 1) -> Tensor:
        """[batch, channels, frames * patch_t, rows * patch, cols * patch] of the video grid."""
        return self.normal(self.batch, channels, self.frames * patch_t, self.video_rows * patch, self.video_cols * patch)

    def words(self, width: int, length: int | None = None) -> Tensor:
        """[batch, text, width]"""
        return self.normal(self.batch, self.text if length is None else length, width)

    def mask(self, length: int | None = None, dtype: torch.dtype = torch.bool, padded: int = 2) -> Tensor:
        """[batch, text], ones; the last `padded` positions of the last batch element are zero."""
        length = self.text if length is None else length
        mask = torch.ones(self.batch, length)
        mask[-1, length - padded :] = 0
        return mask.to(dtype)

    def grid_ids(self, channels: int = 3) -> Tensor:
        """[tokens, channels]: zeros, with row and column in the last two channels."""
        ids = torch.zeros(self.rows, self.cols, channels)
        ids[..., channels - 2] += torch.arange(self.rows)[:, None]
        ids[..., channels - 1] += torch.arange(self.cols)[None, :]
        return ids.reshape(self.tokens, channels)


@dataclass(frozen=True)
class Case:
    """One configuration of one class.

    Invariants: `name` is the class name, followed by `@variant` for further configurations; `construct()` returns a model with
    arbitrary weights, `draw(Draw)` the keyword arguments of its forward.
    """

    name: str
    construct: Callable[[], nn.Module]
    draw: Callable[[Draw], dict[str, Any]]

    @property
    def class_name(self) -> str:
        return self.name.split("@")[0]

    def build(self) -> nn.Module:
        """The model in eval mode with random weights that leave nothing at zero."""
        torch.manual_seed(0)
        return randomise(self.construct()).eval()

    def inputs(self, variant: str) -> dict[str, Any]:
        """Keyword inputs in one of `VARIANTS`."""
        return self.draw(Draw(variant))


def diffusers_case(name: str, draw: Callable[[Draw], dict[str, Any]], /, *, module: str = "diffusers", returns_dict: bool = True, **config: Any) -> Case:
    """A case of a diffusers class, looked up in `module` when it is built."""

    def construct() -> nn.Module:
        return getattr(importlib.import_module(module), name.split("@")[0])(**config)

    def inputs(d: Draw) -> dict[str, Any]:
        return {**draw(d), "return_dict": False} if returns_dict else draw(d)

    return Case(name, construct, inputs)


def rotary(length: int, width: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """(cos, sin) of [length, width], each frequency twice in a row, as pipelines pass it."""
    angles = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(0, width, 2).float() / width))
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()
