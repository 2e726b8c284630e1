"""Load a diffusers pipeline, run it and measure it. Nothing here depends on a model."""

import contextlib
import functools
import inspect
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqpar.errors import SeqparError, UnsupportedError
from seqpar.tools import picture

# Rewriting the prompt is a long run of a language model and draws something else than was asked for: off unless asked for.
CALM_DEFAULTS = {"enable_prompt_rewrite": False}


@dataclass(frozen=True)
class Request:
    """What to generate; fields that are None are left to the pipeline's own default."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generated:
    """One run. `frames` [F, H, W, 3] in 0..1 (None where the rank was told not to decode); `latents` as the scheduler left them."""

    frames: np.ndarray | None
    latents: torch.Tensor
    seconds_per_step: list[float]


@dataclass
class StepLog:
    """Seconds of each step, and the latents after the last one."""

    seconds: list[float] = field(default_factory=list)
    latents: torch.Tensor | None = None


def load(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """`DiffusionPipeline.from_pretrained` on `device`; `model` is a folder or a hub id. Raises SeqparError if it cannot be loaded."""
    from diffusers import DiffusionPipeline

    try:
        with warnings.catch_warnings():
            # The new name, `dtype`, is unknown to the older diffusers versions that are supported here.
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except (OSError, ValueError) as error:  # what diffusers and its hub client raise for a wrong name, no network, missing files
        raise SeqparError(f"cannot load {model!r}; give a pipeline's folder, its hub id, or tiny:NAME. {type(error).__name__}: {error}") from error
    return pipe.to(device)


def be_quiet(*, warnings: bool) -> None:
    """No loading bars from this process, and without `warnings` none of these either: one rank's are enough."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        if not warnings:
            library.set_verbosity_error()
        library.disable_progress_bar()


def generate(pipe: Any, request: Request, device: torch.device, *, decode: bool = True) -> Generated:
    """Run the pipeline once. Random numbers come from the CPU and the seed alone, so every rank draws the same latents.

    `decode=False` skips turning latents into pixels, which only one rank has to do.
    """
    torch.manual_seed(request.seed)
    arguments = call_arguments(pipe, request)
    if decode:
        arguments["output_type"] = "np"
    elif "output_type" in inspect.signature(pipe.__call__).parameters:
        arguments["output_type"] = "latent"
    with record_steps(pipe.scheduler, device) as log:
        output = pipe(**arguments, generator=torch.Generator("cpu").manual_seed(request.seed))
    if log.latents is None:
        raise UnsupportedError(f"{type(pipe).__name__} did not call its scheduler, so there is no step to measure")
    return Generated(picture.frames_of(output) if decode else None, log.latents.float().cpu(), log.seconds)


def call_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """The pipeline's keyword arguments for a request.

    Raises UnsupportedError for something asked for that this pipeline does not take.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    asked = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_frames": request.num_frames,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        **request.extra,
    }
    arguments = {name: value for name, value in asked.items() if value is not None}
    unknown = sorted(arguments.keys() - accepted.keys())
    if unknown:
        raise UnsupportedError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; it takes {', '.join(accepted)}")
    calm = {name: value for name, value in CALM_DEFAULTS.items() if name in accepted}
    one_picture = {"num_frames": 1} if "num_frames" in accepted else {}
    return calm | one_picture | arguments


@contextlib.contextmanager
def record_steps(scheduler: Any, device: torch.device) -> Iterator[StepLog]:
    """Time the steps of a denoising loop from its scheduler: every pipeline has one, callbacks only some have."""
    log = StepLog()
    plain_step, plain_set_timesteps = scheduler.step, scheduler.set_timesteps
    last = time.perf_counter()

    # wraps: pipelines look at the signatures of both.
    @functools.wraps(plain_set_timesteps)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        nonlocal last
        result = plain_set_timesteps(*args, **kwargs)
        last = _now(device)
        return result

    @functools.wraps(plain_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal last
        result = plain_step(*args, **kwargs)
        now = _now(device)
        log.seconds.append(now - last)
        last = now
        log.latents = result[0] if isinstance(result, tuple) else result.prev_sample
        return result

    scheduler.step, scheduler.set_timesteps = step, set_timesteps
    try:
        yield log
    finally:
        del scheduler.step, scheduler.set_timesteps


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def tiny_checkpoint(name: str, folder: Path) -> Path:
    """Build the tiny random checkpoint called `name` in `folder`."""
    from seqpar.models.checkpoints import build_checkpoint

    build_checkpoint(name, folder)
    return folder
