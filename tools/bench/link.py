"""A simulated link: as the command line writes it, and in place of the ranks' own."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import re
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from seqpar.errors import SeqparError

FORM = re.compile(r"(?P<rate>\d+(\.\d+)?)(?P<prefix>[kMGT]?)bit(:(?P<delay>\d+(\.\d+)?)(?P<unit>ns|us|ms|s))?")
PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNIT = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_link(text: str) -> tuple[float, float]:
    """"1Gbit:50us" -> (1e9 bits per second, 5e-5 seconds); the delay may be left out. Raises SeqparError."""
    found = FORM.fullmatch(text)
    if not found or not float(found["rate"]):
        raise SeqparError(f"a link is written RATE[:DELAY], for example 1Gbit:50us or 100Mbit, not {text!r}")
    return float(found["rate"]) * PREFIX[found["prefix"]], float(found["delay"] or 0) * UNIT[found["unit"] or "s"]


@contextlib.contextmanager
def linked(slow_link: tuple[float, float] | None) -> Iterator[None]:
    """Groups made in the block, and the default group, are on a link of (bits per second, seconds of delay). Collective.

    Groups made before cannot be used any more; the default group is made anew at both ends of the block. Raises SeqparError where there is no such link.
    """
    if slow_link is None:
        yield
        return
    try:
        slow_gloo = importlib.import_module("seqpar.tools.slow_link").slow_gloo
    except ImportError as error:
        raise SeqparError(f"a slow link needs seqpar.tools.slow_link, which cannot be imported: {error}") from error
    own = str(dist.get_backend())
    if "gloo" not in own:
        raise SeqparError(f"a slow link is simulated for ranks on CPU (gloo), not for {own}: use --device cpu")
    bits_per_s, latency_s = slow_link
    free = next(number for number in itertools.count() if not hasattr(dist.Backend, f"SLOW_GLOO_{number}"))
    _start_again(slow_gloo(latency_s=latency_s, bytes_per_s=bits_per_s / 8, name=f"slow_gloo_{free}"), f"slow_{free}")
    try:
        yield
    finally:
        _start_again(own, f"after_slow_{free}")


def _start_again(backend: str, prefix: str) -> None:
    """The same ranks on another backend."""
    store, rank, world = _get_default_store(), dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group(backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world)
