"""What every model family offers: configurations, a constructor, and inputs as its pipeline would pass them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seqpar.compat import pytree

Config = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One denoising call, in the units a pipeline's user thinks in.

    Invariants: height, width and frames are in pixels (frames = 1 for pictures); 0 <= pad_text < text_len,
    the number of masked text positions at the end of the last batch element (families without a mask shorten or ignore it).
    """

    height: int
    width: int
    frames: int = 1
    batch: int = 1
    text_len: int = 16
    pad_text: int = 0
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.height, self.width, self.frames, self.batch, self.text_len)
        if min(sizes) < 1:
            raise ValueError(f"sizes must be >= 1, got {self}")
        if not 0 <= self.pad_text < self.text_len:
            raise ValueError(f"pad_text must be in [0, text_len), got {self.pad_text} of {self.text_len}")


class Sampler:
    """Seeded random tensors, equal on every device; on `meta` nothing is computed."""

    def __init__(self, request: Request) -> None:
        self.device = torch.device(request.device)
        self.dtype = request.dtype
        self._generator = torch.Generator("cpu").manual_seed(request.seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal values of `shape` in the request's dtype."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)

    def place(self, value: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`value` on the request's device, in `dtype` if given."""
        return value.to(self.device, dtype or value.dtype)

    def text_mask(self, request: Request, dtype: torch.dtype) -> torch.Tensor:
        """[batch, text_len], one for valid positions; only the last batch element is padded."""
        mask = torch.ones(request.batch, request.text_len)
        mask[-1, request.text_len - request.pad_text :] = 0
        return self.place(mask, dtype)


@dataclass(frozen=True)
class Family:
    """A model family: how to build it and how its pipeline calls it.

    Invariants: `build(config)` returns the unmodified model in eval mode on the current default device;
    `inputs(config, request)` returns keyword arguments of its `forward`;
    one image token covers `pixels_per_token` x `pixels_per_token` pixels and `frames_per_token` frames
    (the first frame has tokens of its own).
    """

    name: str
    construct: Callable[[Config], nn.Module]
    shrink: Callable[[int, int], Config]
    full: Config
    inputs: Callable[[Config, Request], dict[str, Any]]
    native: Mapping[str, int]
    layers_key: str = "num_layers"
    single_layers_key: str | None = None
    pixels_per_token: int = 16
    frames_per_token: int = 1
    default_pad_text: int = 0
    takes_return_dict: bool = True

    @property
    def tiny(self) -> Config:
        """The default small configuration: 2 blocks (of each kind), 4 heads of 16."""
        return self.shrink(4, 2)

    def tiny_config(self, heads: int = 4, layers: int = 2) -> Config:
        """A small configuration with any number of heads (3 and 6 included) and blocks."""
        return self.shrink(heads, layers)

    def with_layers(self, config: Config, layers: int) -> Config:
        """`config` with `layers` blocks in total; two kinds of blocks keep the published proportion of 1 : 2."""
        if self.single_layers_key is None:
            return {**config, self.layers_key: layers}
        double = max(1, layers // 3)
        return {**config, self.layers_key: double, self.single_layers_key: layers - double}

    def build(self, config: Config | None = None, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in eval mode; `device="meta"` takes no memory, whatever the configuration."""
        with torch.device(device):
            model = self.construct(dict(config or self.tiny))
        return cast(model, dtype).eval()

    def example_inputs(self, config: Config | None = None, *, height: int, width: int, return_dict: bool = False, **request: Any) -> dict[str, Any]:
        """Keyword inputs of one denoising step at `height` x `width` pixels; see `Request` for the other keywords.

        Raises ValueError when a size is not a multiple of what one token covers.
        """
        request.setdefault("pad_text", min(self.default_pad_text, request.get("text_len", 16) - 1))
        wanted = Request(height=height, width=width, **request)
        if height % self.pixels_per_token or width % self.pixels_per_token:
            raise ValueError(f"{self.name}: height and width must be multiples of {self.pixels_per_token}, got {height} x {width}")
        if (wanted.frames - 1) % self.frames_per_token:
            raise ValueError(f"{self.name}: frames must be 1 + a multiple of {self.frames_per_token}, got {wanted.frames}")
        inputs = self.inputs(dict(config or self.tiny), wanted)
        return {**inputs, "return_dict": return_dict} if self.takes_return_dict else inputs

    def grid_inputs(self, config: Config | None = None, *, rows: int, columns: int, times: int = 1, **request: Any) -> dict[str, Any]:
        """Like `example_inputs`, with the size given in tokens: rows x columns x times image tokens."""
        return self.example_inputs(
            config,
            height=rows * self.pixels_per_token,
            width=columns * self.pixels_per_token,
            frames=1 + (times - 1) * self.frames_per_token,
            **request,
        )

    def native_inputs(self, config: Config | None = None, **request: Any) -> dict[str, Any]:
        """Inputs of the full-size model at the resolution it is published for; keywords override."""
        return self.example_inputs(config or self.full, **{**self.native, **request})


def output_tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor of a model's output, whatever its structure, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts floating point parameters and buffers in place, except what the class wants kept in float32 (as `from_pretrained` does)."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for owner_name, owner in model.named_modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if not tensor.is_floating_point() or kept.intersection([*owner_name.split("."), name]):
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(dtype)
            else:  # a buffer may be a view, whose data cannot change its dtype alone
                owner._buffers[name] = tensor.to(dtype)
    return model


def latent_grid(request: Request, *, pixels: int, frames: int = 1) -> tuple[int, int, int]:
    """(frames, rows, columns) of the grid with one cell per `pixels` x `pixels` x `frames` block of the request."""
    return (request.frames - 1) // frames + 1, request.height // pixels, request.width // pixels


def image_ids(rows: int, columns: int, *, modality: int = 0, start: int = 0) -> torch.Tensor:
    """[rows * columns, 3]: (modality, row, column) of every token, counted from `start`, in raster order."""
    grid = torch.zeros(rows, columns, 3)
    grid[..., 0] = modality
    grid[..., 1] += start + torch.arange(rows)[:, None]
    grid[..., 2] += start + torch.arange(columns)[None, :]
    return grid.reshape(rows * columns, 3)
