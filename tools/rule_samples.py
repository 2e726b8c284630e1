"""Sample calls of ATen operators: what PyTorch tests its own operators with (`op_db`), and calls written by hand.

A sample is one call of one overload on real tensors. `op_db` holds calls of Python functions; a mode records the overloads
they arrive at, and a function whose own overload is kept by the tracer (`linear`, `scaled_dot_product_attention`) is called directly.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.compat import TorchDispatchMode, pytree
from seqpar.errors import SeqparError
from seqpar.partitioner.registry import registry

aten = torch.ops.aten
SOMETIMES_RANDOM = (aten.scaled_dot_product_attention.default, aten.dropout.default)
DTYPES = (torch.float32, torch.int64, torch.bool, torch.complex64)
LARGEST = 20_000  # elements of a sample; beyond it a check costs more than it tells
# Functions whose samples are slow to make and arrive at no overload with a rule that others do not arrive at.
SKIPPED = ("fft.", "linalg.", "sparse", "signal.", "masked.", "torch.ops", "_refs", "nn.functional.max_unpool", "svd", "stft", "istft", "ormqr")


@dataclass(frozen=True)
class Sample:
    """One call. A tensor that occurs twice in it is one operand."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        found = {id(t): t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)}
        return list(found.values())

    def run(self) -> Any:
        return self.target(*self.args, **self.kwargs)

    def key(self) -> str:
        """Equal for samples that a rule cannot tell apart."""
        order: dict[int, int] = {}

        def describe(leaf: Any) -> str:
            if isinstance(leaf, Tensor):
                return f"{order.setdefault(id(leaf), len(order))}:{leaf.dtype}{tuple(leaf.shape)}"
            return repr(leaf)

        return f"{self.target}{pytree.tree_map(describe, (self.args, self.kwargs))}"

    def __str__(self) -> str:
        def text(leaf: Any) -> Any:
            return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if isinstance(leaf, Tensor) else leaf

        args = [str(pytree.tree_map(text, a)) for a in self.args]
        return f"{self.target}({', '.join(args + [f'{k}={pytree.tree_map(text, v)}' for k, v in self.kwargs.items()])})"


class Recorder(TorchDispatchMode):
    """Collects the calls of overloads that have a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[Sample] = []

    def __torch_dispatch__(self, target: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if usable(target):
            self.samples.append(Sample(target, tuple(args), dict(kwargs)))
        return target(*args, **kwargs)


def usable(target: Any) -> bool:
    """A functional overload with a rule that need not draw random numbers."""
    if registry.find(target) is None or not hasattr(target, "_schema"):
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags and target not in SOMETIMES_RANDOM
    return not target._schema.is_mutable and not random


def suitable(sample: Sample) -> bool:
    """Plain CPU tensors, not too large, and something to shard."""
    tensors = sample.tensors()
    plain = all(t.layout is torch.strided and t.device.type == "cpu" and not t.is_quantized for t in tensors)
    return plain and sum(t.numel() for t in tensors) <= LARGEST


def overloads_of(info: Any) -> list[Any]:
    """Overloads with a rule that carry a function's name."""
    packet = getattr(aten, info.name.rpartition(".")[2], None)
    return [o for o in (getattr(packet, n) for n in packet.overloads()) if usable(o)] if packet is not None else []


def from_op_db(per_function: int, names: Iterable[str] = ()) -> Iterator[Sample]:
    """Samples out of PyTorch's own table, a few of each function and dtype.

    Raises:
        SeqparError: the packages PyTorch's test tables need are not installed.
    """
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ImportError as error:
        raise SeqparError(f"PyTorch's sample inputs need its test packages: {error}. pip install expecttest") from error
    wanted = set(names)
    seen: Counter[Any] = Counter()
    for info in op_db:
        if info.name.startswith(SKIPPED) or info.name.rpartition(".")[2] in ("item", "to_sparse"):
            continue
        if wanted and info.name.rpartition(".")[2] not in wanted:
            continue
        for dtype in DTYPES:
            if dtype in info.dtypes:
                yield from _recorded(info, dtype, per_function, seen)


def _recorded(info: Any, dtype: torch.dtype, count: int, seen: Counter[Any]) -> Iterator[Sample]:
    """Samples of one function; given up when they only arrive at overloads that were `seen` often enough."""
    direct = overloads_of(info)
    try:
        # `info.sample_inputs` would inspect the stack for every sample, which is slow inside a test runner.
        for sample in itertools.islice(info.sample_inputs_func(info, "cpu", dtype, False), count):
            with Recorder() as recorder:
                info.op(sample.input, *sample.args, **sample.kwargs)
            fresh = [s for s in recorder.samples if seen[s.target] < 4 * count]
            fresh += [Sample(o, (sample.input, *sample.args), dict(sample.kwargs)) for o in direct]
            seen.update(s.target for s in fresh)
            yield from fresh
            if not fresh:
                return
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError, IndexError):
        return  # a sample that does not run here (a missing library, an unsupported dtype) has nothing to compare with


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))


def runs(sample: Sample) -> bool:
    """The call is valid (a directly called overload may not accept what its Python function does), returns tensors only, and draws
    no random numbers."""
    try:
        result = sample.run()
        if sample.target in SOMETIMES_RANDOM and not same(result, sample.run()):
            return False
    except Exception:  # whatever the overload refuses
        return False
    leaves = pytree.tree_leaves(result)
    return bool(leaves) and all(isinstance(t, Tensor) and t.layout is torch.strided for t in leaves)


def aliased(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Each sample, and the same call with one tensor in the place of two of equal shape and dtype."""
    for sample in samples:
        yield sample
        tensors = sample.tensors()
        for a, b in itertools.combinations(tensors, 2):
            if a.shape == b.shape and a.dtype == b.dtype and a.dim() > 0:
                swap = lambda leaf, a=a, b=b: a if leaf is b else leaf  # noqa: E731
                args, kwargs = pytree.tree_map(swap, (sample.args, sample.kwargs))
                yield Sample(sample.target, args, kwargs)
                break


def chosen(samples: Iterable[Sample], per_operator: int) -> dict[Any, list[Sample]]:
    """Different samples of each overload, those with long dims first."""
    found: dict[Any, dict[str, Sample]] = {}
    for sample in aliased(samples):
        if suitable(sample):
            found.setdefault(sample.target, {}).setdefault(sample.key(), sample)

    def short_dims(sample: Sample) -> int:
        return -sum(n >= 4 for t in sample.tensors() for n in t.shape)

    result: dict[Any, list[Sample]] = {}
    for target, by_key in found.items():
        good = filter(runs, sorted(by_key.values(), key=short_dims))
        result[target] = list(itertools.islice(good, per_operator))
    return {target: kept for target, kept in result.items() if kept}
