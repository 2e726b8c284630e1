"""Keep a model as it was: an eager call before tracing, and its Python state put back after tracing."""

import functools
import gc
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

CONTAINERS = (list, dict, set)
PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})
DEPTH = 10  # of containers and objects in an attribute: an object is one level and its attributes are another
LRU_CACHE = type(functools.lru_cache(len))


def warm_up(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], watch: AbstractContextManager[Any] | None = None, results: list[Any] | None = None
) -> Exception | None:
    """Run `model` once eagerly, so that tables it memoises hold real tensors before it is traced.

    `watch` is active during the call; what it returns is appended to `results`. The model may write to the inputs: pass copies. Not done on meta tensors. Buffers the call writes
    and the random state are put back. Returns the exception of a call that failed (for example out of memory: the tracer copes
    without), else None.
    """
    state = list(model.parameters()) + list(model.buffers())
    if any(tensor.device.type == "meta" for tensor in state):
        return None
    devices = {tensor.device for tensor in state if tensor.device.type == "cuda"}
    failure: Exception | None = None
    # Inference mode would leave inference tensors in the tables.
    with torch.random.fork_rng(devices=sorted({device.index or 0 for device in devices})), torch.inference_mode(False), torch.no_grad():
        try:
            with buffers_kept(model), watch or nullcontext():
                returned = model(*args, **kwargs)
            if results is not None:
                results.append(returned)
        except Exception as error:  # whatever it is, tracing will tell more about it
            failure = error.with_traceback(None)
    if isinstance(failure, torch.OutOfMemoryError):
        gc.collect()
        torch.cuda.empty_cache()
    return failure


@contextmanager
def buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Put back the content of every buffer on leaving."""
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for buffer, before in saved:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


@contextmanager
def restored(model: torch.nn.Module) -> Iterator[None]:
    """Put back every attribute of the model's modules (and of plain objects and containers they hold), and the containers in their
    classes and files, on leaving.

    Tracing assigns fake tensors and symbols to memoised tables and counters; none may stay behind. A `functools.lru_cache` of the
    model's code that remembered something new forgets everything.
    """
    saved: list[tuple[Any, Any]] = []
    code = code_of(model)
    caches = caches_in(code)
    seen: set[int] = set()
    for module in model.modules():
        remember(module.__dict__, saved, seen, DEPTH)
    for value in code:
        if type(value) in CONTAINERS:  # a subclass may be a registry that imports when it is read
            remember(value, saved, seen, depth=1)
    try:
        yield
    finally:
        put_back(saved, caches)


def put_back(saved: Sequence[tuple[Any, Any]], caches: Sequence[tuple[Any, int]]) -> None:
    """Let containers hold what they held (`remember`), and `lru_cache`s that remembered something since (they had so many misses) forget everything."""
    for cache, misses in caches:
        if cache.cache_info().misses != misses:
            cache.cache_clear()
    for container, before in saved:
        if isinstance(container, list):
            if len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
                container[:] = before
        elif isinstance(container, set):
            if container != before:
                container.clear()
                container.update(before)
        elif container.keys() != before.keys() or any(container[key] is not before[key] for key in before):
            container.clear()
            container.update(before)


def caches_in(values: Iterable[Any]) -> list[tuple[Any, int]]:
    """(`lru_cache`, its misses so far)"""
    return [(value, value.cache_info().misses) for value in values if isinstance(value, LRU_CACHE)]


def code_of(model: torch.nn.Module) -> list[Any]:
    """Class attributes of the model's classes and what the files that define them hold, torch's left out: where code memoises beside the model."""
    kinds = {base for kind in {type(module) for module in model.modules()} for base in kind.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")}
    files = [vars(sys.modules[name]) for name in {kind.__module__ for kind in kinds} if name in sys.modules]
    return [getattr(value, "__func__", value) for names in (*map(vars, kinds), *files) for name, value in list(names.items()) if not name.startswith("__")]


def remember(value: Any, saved: list[tuple[Any, Any]], seen: set[int], depth: int) -> None:
    """Append (container, shallow copy) for `value` and the containers and plain objects it holds."""
    if depth == 0 or type(value) in PLAIN or id(value) in seen or isinstance(value, torch.nn.Module | torch.Tensor) or inspect.isclass(value):
        return
    seen.add(id(value))
    if isinstance(value, CONTAINERS):
        saved.append((value, dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else set(value)))
        children = list(value.values()) if isinstance(value, dict) else list(value)
    elif isinstance(value, tuple):
        children = list(value)
    elif isinstance(value, functools.partial):
        children = [value.func, value.args, value.keywords]
    elif hasattr(value, "__dict__") and not inspect.isroutine(value) and type(value).__module__.partition(".")[0] not in ("torch", "builtins"):
        children = [value.__dict__]
    else:
        return
    for child in children:
        remember(child, saved, seen, depth - 1)
