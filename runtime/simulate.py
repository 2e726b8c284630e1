"""All ranks in one process: one thread per rank, collectives as meetings of the threads."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from seqpar.errors import SeqparError
from seqpar.runtime.counting import Traffic

T = TypeVar("T")
Combine = Callable[[list[Any]], list[Tensor]]


class MismatchError(SeqparError):
    """The ranks of a simulated group do not make the same collective calls."""


class StrandedError(MismatchError):
    """A rank waits for another one that failed or has finished."""


class _Meeting:
    """Where the ranks of one group meet. The last to arrive computes everybody's result, while the others wait:
    no buffer is read after its owner has gone on, and a disagreement is found in one place. Waiting ranks lay down the world's baton."""

    def __init__(self, size: int, baton: threading.RLock) -> None:
        self.size = size
        self.condition = threading.Condition(baton)
        self.arrived: dict[int, tuple[str, Any]] = {}
        self.results: list[Tensor] | Exception = []
        self.round = 0
        self.left: int | None = None

    def meet(self, rank: int, kind: str, payload: Any, combine: Combine) -> Tensor:
        with self.condition:
            self.arrived[rank] = kind, payload
            if len(self.arrived) == self.size:
                self._conclude(combine)
            else:
                current = self.round
                self.condition.wait_for(lambda: self.round != current or self.left is not None)
                if self.round == current:
                    raise StrandedError(f"rank {rank} waits in {kind}, but rank {self.left} of its group is gone")
            if isinstance(self.results, Exception):
                raise self.results
            return self.results[rank]

    def _conclude(self, combine: Combine) -> None:
        kinds, payloads = zip(*(self.arrived[r] for r in range(self.size)), strict=True)
        self.arrived = {}
        try:
            if len(set(kinds)) > 1:
                raise MismatchError(f"the ranks of one group make different calls: {list(kinds)}")
            self.results = combine(list(payloads))
        except Exception as error:  # every rank of the group raises it
            self.results = error
        self.round += 1
        self.condition.notify_all()

    def leave(self, rank: int) -> None:
        with self.condition:
            self.left = rank
            self.condition.notify_all()


@dataclass(frozen=True)
class SimulatedGroup:
    """One rank's handle of a group of threads; see `groups.LocalGroup`."""

    rank: int
    size: int
    meeting: _Meeting = field(repr=False)
    traffic: Traffic = field(repr=False)

    def all_to_all(self, flat: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], kind: str) -> Tensor:
        """[sum(in_sizes)] -> [sum(out_sizes)]; MismatchError when the ranks' sizes or dtypes disagree."""
        self.traffic.all_to_all(flat, out_sizes, self.rank, kind)
        payload = flat, list(out_sizes), list(in_sizes)
        return self.meeting.meet(self.rank, kind, payload, _all_to_all)

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ..] -> [size * n, ..]; MismatchError when shapes or dtypes disagree."""
        self.traffic.all_gather(x, self.size)
        return self.meeting.meet(self.rank, "all_gather", x, _all_gather)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        """Same shape, reduced in rank order; MismatchError when shapes or dtypes disagree."""
        self.traffic.all_reduce(x, self.size)
        return self.meeting.meet(self.rank, f"all_reduce {op}", x, lambda xs: _all_reduce(xs, op))


class SimulatedWorld:
    """ulysses x ring ranks as threads: rank = ring index * ulysses + ulysses index.

    `traffic[rank]` counts what each rank received, over all runs.
    """

    def __init__(self, ulysses: int, ring: int) -> None:
        self.ulysses = ulysses
        self.ring = ring
        self.size = ulysses * ring
        self.traffic = [Traffic() for _ in range(self.size)]

    def run(self, fns: Sequence[Callable[[dict[str, SimulatedGroup]], T]]) -> list[T]:
        """Call `fns[rank]` with its groups {"ulysses", "ring", "sp"}, one thread per rank; results by rank.

        The first error of a rank is raised here, once; ranks that wait for it are released.
        """
        assert len(fns) == self.size, f"{len(fns)} functions for {self.size} ranks"
        baton = threading.RLock()  # who holds it runs: threads that run by turns anyway would fight over the interpreter's lock at every operator
        groups = self._groups(baton)
        results: dict[int, T] = {}
        errors: dict[int, BaseException] = {}
        enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        def work(rank: int) -> None:
            try:
                with baton, torch.inference_mode(inference), torch.set_grad_enabled(enabled):  # modes are per thread
                    results[rank] = fns[rank](groups[rank])
            except BaseException as error:
                errors[rank] = error
            finally:
                for group in groups[rank].values():
                    group.meeting.leave(rank)

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise _culprit(errors)
        return [results[rank] for rank in range(self.size)]

    def _groups(self, baton: threading.RLock) -> list[dict[str, SimulatedGroup]]:
        u, r = self.ulysses, self.ring
        rows = [_Meeting(u, baton) for _ in range(r)]
        columns = [_Meeting(r, baton) for _ in range(u)]
        everyone = _Meeting(u * r, baton)
        return [
            {
                "ulysses": SimulatedGroup(rank % u, u, rows[rank // u], self.traffic[rank]),
                "ring": SimulatedGroup(rank // u, r, columns[rank % u], self.traffic[rank]),
                "sp": SimulatedGroup(rank, u * r, everyone, self.traffic[rank]),
            }
            for rank in range(self.size)
        ]


def _culprit(errors: dict[int, BaseException]) -> BaseException:
    """The error to report: not that of a rank which only waited for another."""
    rank = next((r for r in sorted(errors) if not isinstance(errors[r], StrandedError)), min(errors))
    errors[rank].add_note(f"raised on simulated rank {rank}")
    return errors[rank]


def _same_form(xs: list[Tensor]) -> None:
    forms = [(tuple(x.shape), x.dtype) for x in xs]
    if len(set(forms)) > 1:
        raise MismatchError(f"the ranks' tensors differ: {forms}")


def _all_to_all(payloads: list[Any]) -> list[Tensor]:
    flats, outs, ins = zip(*payloads, strict=True)
    for receiver, out_sizes in enumerate(outs):
        sent = [in_sizes[receiver] for in_sizes in ins]
        if sent != out_sizes:
            raise MismatchError(f"rank {receiver} expects {out_sizes} elements from the ranks, which send {sent}")
    if len({flat.dtype for flat in flats}) > 1:
        raise MismatchError(f"the ranks' dtypes differ: {[flat.dtype for flat in flats]}")
    pieces = [flat.split(sizes) for flat, sizes in zip(flats, ins, strict=True)]
    return [torch.cat([row[receiver] for row in pieces]) for receiver in range(len(flats))]


def _all_gather(xs: list[Tensor]) -> list[Tensor]:
    _same_form(xs)
    return [torch.cat(xs) for _ in xs]


def _all_reduce(xs: list[Tensor], op: str) -> list[Tensor]:
    _same_form(xs)
    total = xs[0]
    for x in xs[1:]:
        match op:
            case "max":
                total = torch.maximum(total, x)
            case "min":
                total = torch.minimum(total, x)
            case "product":
                total = total * x
            case _:
                total = total + x
    if op == "avg":
        total = total / len(xs)
    return [total.clone() for _ in xs]
