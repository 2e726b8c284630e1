"""When a denoising loop is running. Pipelines of diffusers draw a progress bar around it, and nowhere else."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch.distributed as dist

from seqpar.denoiser import attribute_set

BAR_CONFIG = "_progress_bar_config"  # where diffusers keeps what set_progress_bar_config was given


class Loops:
    """The loops that run during one call of a pipeline."""

    def __init__(self) -> None:
        self._count = 0

    @property
    def running(self) -> bool:
        """True while there is one."""
        return self._count > 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A loop, for the time of the block."""
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

    @contextlib.contextmanager
    def watched(self, pipes: Iterable[Any]) -> Iterator[None]:
        """Notice the loops of these pipelines on this thread, for the time of the block, and of those that are made meanwhile.

        Bars are noticed where they are drawn: by a class that all pipelines inherit from, or the blocks of a modular pipeline.
        """
        with contextlib.ExitStack() as stack:
            for owner in _owners(pipes):
                stack.enter_context(self._bars_noticed(owner))
            yield

    @contextlib.contextmanager
    def _bars_noticed(self, owner: type) -> Iterator[None]:
        plain, thread = vars(owner)["progress_bar"], threading.get_ident()

        @functools.wraps(plain)
        def progress_bar(drawer: Any, *args: Any, **kwargs: Any) -> Any:
            return self._bar(plain, drawer, args, kwargs) if threading.get_ident() == thread else plain(drawer, *args, **kwargs)

        owner.progress_bar = progress_bar  # type: ignore[attr-defined]
        try:
            yield
        finally:
            owner.progress_bar = plain  # type: ignore[attr-defined]

    def _bar(self, plain: Callable[..., Any], drawer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LoopBar:
        # Those of the other ranks would be drawn over the first one's.
        hidden = {} if is_first_rank() else {"disable": True}
        with attribute_set(drawer, BAR_CONFIG, {**getattr(drawer, BAR_CONFIG, {}), **hidden}):
            return LoopBar(plain(drawer, *args, **kwargs), self)


def draws_bars(pipe: Any) -> bool:
    """True for what looks like a pipeline, modular or not."""
    return hasattr(pipe, "progress_bar") or hasattr(pipe, "blocks")


def _owners(pipes: Iterable[Any]) -> list[type]:
    """The classes that define `progress_bar` for the pipelines or their blocks, each once."""
    drawers = [type(drawer) for pipe in pipes for drawer in (pipe, *_blocks(getattr(pipe, "blocks", None)))]
    found = (next((kind for kind in drawer.__mro__ if "progress_bar" in vars(kind)), None) for drawer in drawers)
    return list(dict.fromkeys(kind for kind in found if kind is not None))


def _blocks(block: Any) -> Iterator[Any]:
    """The block of a modular pipeline and all inside it."""
    if block is not None:
        yield block
        for inner in getattr(block, "sub_blocks", {}).values():
            yield from _blocks(inner)


def is_first_rank() -> bool:
    """Of all processes, not only of those that share a sequence."""
    return not dist.is_initialized() or dist.get_rank() == 0


class LoopBar:
    """A progress bar (tqdm) that tells when its loop begins and ends: `with bar`, `for … in bar`, or `bar.update()` up to `bar.close()`."""

    def __init__(self, bar: Any, loops: Loops) -> None:
        self._bar, self._loops = bar, loops
        self._running = contextlib.ExitStack()
        # A bar without steps to iterate over is used by hand, at the latest from its first update on; one with steps runs while they do.
        if getattr(bar, "iterable", None) is None:
            self._running.enter_context(loops.one())

    def __iter__(self) -> Iterator[Any]:
        with self._loops.one():
            yield from self._bar

    def __enter__(self) -> Any:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> Any:
        self._running.close()
        return self._bar.__exit__(*exception)

    def close(self) -> None:
        """End of the loop."""
        self._running.close()
        self._bar.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
