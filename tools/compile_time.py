"""Compile time against the number of blocks, on meta tensors.

    python -m seqpar.tools.compile_time --model flux --blocks 10 20 40 57 --ulysses 4 --ring 2
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass

from seqpar.models import registry
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace


@dataclass(frozen=True)
class Timing:
    """Seconds of CPU time of this process; `compile` is infer + solve + rewrite (of one rank)."""

    blocks: int
    nodes: int
    trace: float
    compile: float

    @property
    def per_block(self) -> float:
        return self.compile / self.blocks


def measure(model: str, blocks: int, *, ulysses: int, ring: int, full: bool = True, repeats: int = 2) -> Timing:
    """Trace once, compile `repeats` times, keep the fastest."""
    family = registry.get(model)
    config = family.with_layers(family.full if full else family.tiny_config(heads=8), blocks)
    inputs = family.native_inputs(config, device="meta") if full else family.grid_inputs(config, rows=16, columns=16, text_len=32, device="meta")
    started = time.process_time()
    traced = trace(family.build(config, device="meta"), (), inputs, dynamic=False)
    traced_at = time.process_time()
    seconds = []
    for _ in range(repeats):
        begun = time.process_time()
        partition(traced, ulysses=ulysses, ring=ring).program(0)
        seconds.append(time.process_time() - begun)
    return Timing(blocks, len(traced.gm.graph.nodes), traced_at - started, min(seconds))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", choices=registry.names())
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 20, 40, 57])
    parser.add_argument("--ulysses", type=int, default=4)
    parser.add_argument("--ring", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    timings = [measure(options.model, n, ulysses=options.ulysses, ring=options.ring) for n in options.blocks]
    if options.json:
        print(json.dumps([asdict(t) for t in timings]))
        return
    print(f"{'blocks':>6} {'nodes':>7} {'trace s':>8} {'infer + solve + rewrite s':>26} {'ms per block':>13} {'of trace':>9}")
    for t in timings:
        print(f"{t.blocks:>6} {t.nodes:>7} {t.trace:>8.2f} {t.compile:>26.2f} {1000 * t.per_block:>13.1f} {t.compile / t.trace:>9.1%}")


if __name__ == "__main__":
    main()
