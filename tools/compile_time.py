"""Compile time against the number of blocks, on meta tensors: tracing, planning, and a second start from the cache.

    python -m seqpar.tools.compile_time --model flux --blocks 10 20 40 57 --ulysses 4 --ring 2
    python -m seqpar.tools.compile_time --model flux qwen-image wan          # as many blocks as the published model has
    python -m seqpar.tools.compile_time --model flux --every-block           # and none of them copied from another
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch

from seqpar.cache import Cache
from seqpar.compile import Compiler, Settings
from seqpar.models import registry
from seqpar.passes import export as export_file
from seqpar.passes.arguments import canonical_call
from seqpar.passes.config import config
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace


@dataclass(frozen=True)
class Timing:
    """Seconds of CPU time of this process.

    trace: all of it; operators: the part in which AOTAutograd (or torch.export) runs the model and notes operators. compile: infer + solve + rewrite, of
    one rank. write: into the cache, for all ranks. second: a second start with the cache, from the digest of the model to the program;
    None where the program cannot be kept.
    """

    model: str
    blocks: int
    nodes: int
    trace: float
    operators: float
    compile: float
    write: float = 0.0
    second: float | None = None

    @property
    def per_block(self) -> float:
        return self.compile / self.blocks

    @property
    def total(self) -> float:
        """A first start."""
        return self.trace + self.compile


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[float]]:
    """CPU seconds of every call of a function."""
    seconds: list[float] = []
    function: Callable[..., Any] = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - begun)

    with mock.patch.object(owner, name, run):
        yield seconds


def measure(model: str, blocks: int | None = None, *, ulysses: int, ring: int, full: bool = True, repeats: int = 2, second: bool = False, every_block: bool = False) -> Timing:
    """Trace once, compile `repeats` times, keep the fastest. blocks: the published number if None. second: also time a start from the cache.

    every_block: run all blocks while tracing, also those that are alike.
    """
    family = registry.get(model)
    settings = family.full if full else family.tiny_config(heads=8)
    blocks = sum(settings[key] for key in (family.layers_key, family.single_layers_key) if key) if blocks is None else blocks
    settings = family.with_layers(settings, blocks)
    inputs = family.native_inputs(settings, device="meta") if full else family.grid_inputs(settings, rows=16, columns=16, text_len=32, device="meta")
    built = family.build(settings, device="meta")
    every = mock.patch.object(export_file, "in_one_trace", functools.partial(export_file.in_one_trace, stamp=False)) if every_block else nullcontext()
    started = time.process_time()
    with every, counted(export_file, "aot_export") as short, counted(torch.export, "export") as long:
        traced = trace(built, (), inputs, dynamic=False)
    traced_at = time.process_time()
    seconds = []
    for _ in range(repeats):
        begun = time.process_time()
        partition(traced, ulysses=ulysses, ring=ring).program(0)
        seconds.append(time.process_time() - begun)
    timing = Timing(model, blocks, len(traced.gm.graph.nodes), traced_at - started, sum(short) + sum(long), min(seconds))
    return with_cache(timing, built, inputs, traced, ulysses, ring) if second else timing


def with_cache(timing: Timing, model: torch.nn.Module, inputs: dict[str, Any], traced: Any, ulysses: int, ring: int) -> Timing:
    """The same with the cache: write the programs of all ranks, then do what a second start does."""
    builder = Compiler(model, Settings(ulysses, ring, dynamic=False))
    call = canonical_call(inspect.signature(model.forward), (), inputs)
    with tempfile.TemporaryDirectory() as folder, config(cache_dir=folder):
        program, _ = builder.emit(traced)
        first = Cache.of(builder, call, False)
        begun = time.process_time()
        if first is not None:
            first.write(program)
        written = time.process_time()
        again = Cache.of(builder, call, False)
        kept = None if again is None else again.read()
        done = time.process_time()
    return Timing(**{**asdict(timing), "write": written - begun, "second": None if kept is None else done - written})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["flux"], choices=registry.names())
    parser.add_argument("--blocks", type=int, nargs="+", help="default: as many as the published model has")
    parser.add_argument("--ulysses", type=int, default=4)
    parser.add_argument("--ring", type=int, default=2)
    parser.add_argument("--every-block", action="store_true", help="while tracing, run also the blocks that are like others")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    wanted = [(model, n) for model in options.model for n in options.blocks or [None]]
    timings = (measure(model, n, ulysses=options.ulysses, ring=options.ring, second=True, every_block=options.every_block) for model, n in wanted)
    if options.json:
        print(json.dumps([asdict(t) for t in timings]))
        return
    print("seconds of CPU time; one process")
    print(f"{'model':<14} {'blocks':>6} {'nodes':>6} {'operators':>10} {'trace':>6} {'infer + solve + rewrite':>24} {'of trace':>9} {'total':>6} {'write':>6} {'second start':>13}")
    for t in timings:
        second = "not kept" if t.second is None else f"{t.second:.2f}"
        print(f"{t.model:<14} {t.blocks:>6} {t.nodes:>6} {t.operators:>10.2f} {t.trace:>6.2f} {t.compile:>24.2f} {t.compile / t.trace:>9.1%} {t.total:>6.2f} {t.write:>6.2f} {second:>13}", flush=True)


if __name__ == "__main__":
    main()
