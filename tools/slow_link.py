"""A gloo backend over a slower link, to see on one machine what overlap and fewer collectives are worth.

    backend = slow_gloo(latency_s=1e-3, bytes_per_s=125e6)        # 1 Gbit/s, once per process
    dist.init_process_group(backend, …)

Every process has one link for all its groups. What it sends (for an all-to-all, an all-gather, …, the larger of what goes out and comes in; an
all-reduce as its reduce-scatter and all-gather) occupies the link for bytes / bytes_per_s, one collective after the other; `latency_s`
later it is handed to gloo. So a collective is complete when the slowest rank's bytes have arrived, plus what gloo itself takes, and the time passes
in a sleeping thread: no rank's computation is slowed down. What a rank sends itself is free. The calls are those of the process group, so functional
collectives, `torch.distributed` functions and other libraries meet the same link.

Buffers are read when gloo gets them: as with any asynchronous collective, they must not be written to before it is waited for.
Not there (they raise): what gloo's groups offer beyond the methods of `SlowGroup`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]

Job = tuple[float, Callable[[], Any], Any, "torch.futures.Future[Any]"]


class Link:
    """What one process can send: a queue that is emptied in order, each entry when its bytes have passed."""

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        if latency_s < 0 or bytes_per_s <= 0:
            raise ValueError(f"a link needs latency_s >= 0 and bytes_per_s > 0, got {latency_s} and {bytes_per_s}")
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.free = 0.0  # when the last bytes will have left
        self.lock = threading.Lock()
        self.waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.issued: queue.SimpleQueue[tuple[Any, Any, torch.futures.Future[Any]]] = queue.SimpleQueue()
        for loop in (self._issue, self._complete):
            threading.Thread(target=loop, daemon=True, name=f"slow link{loop.__name__}").start()

    def send(self, nbytes: int, call: Callable[[], Any], result: Any) -> Any:
        """A Work that completes when `call`, made once `nbytes` have passed, has completed."""
        done: torch.futures.Future[Any] = torch.futures.Future()
        with self.lock:
            self.free = max(self.free, time.monotonic()) + nbytes / self.bytes_per_s
            self.waiting.put((self.free + self.latency_s, call, result, done))
        return _create_work_from_future(done)

    def _issue(self) -> None:
        while True:
            due, call, result, done = self.waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                self.issued.put((call(), result, done))
            except Exception as error:  # raised where the work is waited for
                done.set_exception(error)

    def _complete(self) -> None:
        while True:
            work, result, done = self.issued.get()
            try:
                work.wait()
                done.set_result(result)
            except Exception as error:
                done.set_exception(error)


ProcessGroup: Any = dist.ProcessGroup  # its methods are declared with overloads that no subclass written in Python needs


class SlowGroup(ProcessGroup):
    """gloo behind a `Link`. Some methods have two names: that of older versions of torch, and that of newer ones."""

    def __init__(self, inner: Any, link: Link, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._inner, self._link, self._rank, self._size = inner, link, rank, size

    def size(self) -> int:
        """How many ranks."""
        return self._size

    def rank(self) -> int:
        """This one."""
        return self._rank

    def getBackendName(self) -> str:
        """For torch's messages."""
        return "slow gloo"

    @property
    def pg_name(self) -> str:
        """The name under which torch knows the group."""
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        """The same."""
        return self.pg_name

    def _later(self, nbytes: float, names: tuple[str, ...], result: Any, *args: Any) -> Any:
        method = next(getattr(self._inner, name) for name in names if hasattr(self._inner, name))
        return self._link.send(int(nbytes), lambda: method(*(arg for arg in args if arg is not None)), result)

    def all_to_all_single(self, output: Tensor, input: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any = None) -> Any:
        """[sum(input_sizes), ..] -> [sum(output_sizes), ..]; no sizes: equal parts."""
        row = output[:1].numel() * output.element_size() if output.numel() else input[:1].numel() * input.element_size()
        sizes = [list(s) or [x.shape[0] // self._size] * self._size for x, s in ((output, output_sizes), (input, input_sizes))]
        nbytes = row * max(sum(s) - s[self._rank] for s in sizes)
        return self._later(nbytes, ("all_to_all_single", "alltoall_base"), [output], output, input, output_sizes, input_sizes, opts)

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """Lists of one tensor per rank."""
        nbytes = max(_nbytes(x for r, x in enumerate(xs) if r != self._rank) for xs in (outputs, inputs))
        return self._later(nbytes, ("alltoall",), outputs, outputs, inputs, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        """[n, ..] -> [size * n, ..]"""
        return self._later(_nbytes([input]) * (self._size - 1), ("all_gather_single", "_allgather_base"), [output], output, input, opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """Several in a row: the last one completes last."""
        return [self.all_gather_single(*pair) for pair in zip(outputs, inputs, strict=True)][-1]

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        """A list of one tensor per rank for each input."""
        return self._later(_nbytes(inputs) * (self._size - 1), ("allgather",), outputs, outputs, inputs, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        """[size * n, ..] -> [n, ..]"""
        return self._later(_nbytes([output]) * (self._size - 1), ("reduce_scatter_single", "_reduce_scatter_base"), [output], output, input, opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """Several in a row."""
        return [self.reduce_scatter_single(*pair) for pair in zip(outputs, inputs, strict=True)][-1]

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """In place."""
        return self._later(2 * _nbytes(tensors) * (self._size - 1) / self._size, ("allreduce",), tensors, tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Several at once, in place."""
        return self._later(2 * _nbytes(tensors) * (self._size - 1) / self._size, ("allreduce_coalesced",), tensors, tensors, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """In place."""
        return self._later(_nbytes(tensors), ("broadcast",), tensors, tensors, opts)

    def barrier(self, opts: Any = None) -> Any:
        """Only the latency."""
        return self._later(0, ("barrier",), [], opts)

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> Any:
        """To one rank."""
        return self._later(_nbytes(tensors), ("send",), tensors, tensors, destination, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        """The sender's link takes the time."""
        return self._inner.recv(tensors, source, tag)


def slow_gloo(*, latency_s: float, bytes_per_s: float, name: str = "slow_gloo") -> str:
    """Register a backend for CPU tensors and return its name, for `init_process_group` or `new_group`.

    Args:
        latency_s: seconds from the last byte sent to its arrival, of every collective.
        bytes_per_s: what one process can send, and receive at the same time.
        name: of the backend; one name is one link, and can be registered once per process.

    Raises:
        ValueError: a negative latency, no bandwidth, or a name that is taken.
    """
    if hasattr(dist.Backend, name.upper()):
        raise ValueError(f"a backend {name!r} exists already: choose another name for a second link")
    link = Link(latency_s, bytes_per_s)

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> SlowGroup:
        return SlowGroup(dist.ProcessGroupGloo(store, rank, size, timeout), link, rank, size)

    dist.Backend.register_backend(name, create, devices=["cpu"])
    return name


def _nbytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
