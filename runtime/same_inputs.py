"""The first rank's tensors and random numbers for all ranks of a mesh: what ranks compute each for themselves need not have the same bits."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils.weak import WeakTensorKeyDictionary

from seqpar.errors import DisagreementError
from seqpar.runtime.agree import check_agreement
from seqpar.runtime.mesh import SequenceMesh

# Relative (2-norm). Rounding of an encoder in bfloat16 stays far below, another prompt or seed far above.
ROUNDING = 0.05


class SameInputs:
    """Replaces tensors by the first rank's, for the time of one call of a pipeline; collective.

    All are sent every time: what enters a denoiser is small beside what is exchanged inside it. Except `known` ones.
    """

    def __init__(self, mesh: SequenceMesh) -> None:
        self._mesh = mesh
        self._known: Any = WeakTensorKeyDictionary()  # tensor -> its version when it was noted
        self._compared = False

    def known(self, tensors: Sequence[Tensor]) -> None:
        """Note tensors that have the same bits on every rank (outputs of a compiled program): not sent until they are written to."""
        for tensor in tensors:
            if not tensor.is_inference():  # those do not count their writes
                self._known[tensor] = tensor._version

    def __call__(self, tensors: Mapping[str, Tensor], text: str) -> dict[str, Tensor]:
        """The first rank's values, shapes and dtypes kept; `text` describes the call (shapes, plain values) one item a line.

        Raises DisagreementError on all ranks if in the first call the texts or the values differ by more than rounding: the ranks were asked for
        different things.
        """
        first, self._compared = not self._compared, True
        if first:
            agree(text, self._mesh)
        names = [name for name, tensor in tensors.items() if not self._is_known(tensor)]
        received = dict(zip(names, from_first_rank([tensors[name] for name in names], self._mesh), strict=True))
        if first and received:
            self._compare([(name, tensors[name], value) for name, value in received.items()])
        return {**tensors, **received}

    def _is_known(self, tensor: Tensor) -> bool:
        return not tensor.is_inference() and self._known.get(tensor) == tensor._version

    def _compare(self, pairs: Sequence[tuple[str, Tensor, Tensor]]) -> None:
        largest = torch.tensor([relative_difference(own, given) for _, own, given in pairs], dtype=torch.float64)
        largest = _max_over_ranks(largest, self._mesh)
        worst = int(largest.argmax())
        if largest[worst] > ROUNDING:
            raise DisagreementError(
                f"the ranks that share a sequence were asked for different things: {pairs[worst][0]} differs by {float(largest[worst]):.0%} between them. "
                "Pass the same prompts, pictures and latents on all of them (with several groups of ranks, on all ranks of a group)"
            )


def relative_difference(own: Tensor, given: Tensor) -> float:
    """|own - given| / |given|; 0 for equal tensors."""
    if own is given or own.numel() == 0:
        return 0.0
    wide = torch.complex128 if given.is_complex() else torch.float64
    difference, size = (own.to(wide) - given.to(wide)).norm(), given.to(wide).norm()
    return float(difference / size.clamp_min(1e-30)) if float(difference) else 0.0


def from_first_rank(tensors: Sequence[Tensor], mesh: SequenceMesh) -> list[Tensor]:
    """The tensors as the first rank has them, in one broadcast; shapes and dtypes must agree. The first rank gets its own objects back."""
    if mesh.size == 1 or not tensors:
        return list(tensors)
    device = _device(mesh)
    with torch.no_grad():
        parts = [_bytes(tensor).to(device) for tensor in tensors]
        buffer = torch.cat(parts)
        dist.broadcast(buffer, group_src=0, group=_group(mesh))
        if mesh.rank == 0:
            return list(tensors)
        pieces = buffer.split([part.numel() for part in parts])
        # A copy: a dtype view needs an aligned start.
        return [_from_bytes(piece.clone().to(tensor.device), tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def _bytes(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    # A copy: one value, expanded, counts as contiguous with a stride of 0, which has no bytes to view.
    return real.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _from_bytes(piece: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        return torch.view_as_complex(piece.view(like.dtype.to_real()).reshape(*like.shape, 2))
    return piece.view(like.dtype).reshape(like.shape)


def agree(text: str, mesh: SequenceMesh) -> None:
    """Return if all ranks of the mesh have the same text; one small collective.

    Raises DisagreementError on every rank, with the first line that differs.
    """
    if mesh.size == 1:
        return
    # Two halves below 2^31: a sign can be changed without overflow.
    digest = hashlib.sha256(text.encode()).digest()
    numbers = torch.tensor([int.from_bytes(digest[i : i + 4], "big") for i in (0, 4)], dtype=torch.int64)
    largest = _max_over_ranks(torch.cat([numbers, -numbers]), mesh)
    if not torch.equal(largest[:2], -largest[2:]):
        check_agreement(text, mesh)


@contextlib.contextmanager
def first_ranks_random_numbers(generators: Sequence[torch.Generator], mesh: SequenceMesh) -> Iterator[None]:
    """For the time of the block, torch's default generators are in the first rank's state, on the CPU and on the mesh's device.

    `generators` are set to the first rank's state and stay; the defaults of other ranks are put back at the end. Collective.
    """
    if mesh.size == 1:
        yield
        return
    agree(f"{len(generators)} generators on {[str(g.device.type) for g in generators]}", mesh)
    own = _default_states(mesh)
    sent: list[Any] = [(own, [g.get_state() for g in generators])]
    dist.broadcast_object_list(sent, group_src=0, group=_group(mesh), device=_device(mesh))
    if mesh.rank == 0:
        yield
        return
    defaults, states = sent[0]
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    _set_default_states(defaults, mesh)
    try:
        yield
    finally:
        _set_default_states(own, mesh)


def _default_states(mesh: SequenceMesh) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if _device(mesh).type != "cpu":
        states.append(torch.get_device_module(_device(mesh)).get_rng_state())
    return states


def _set_default_states(states: Sequence[Tensor], mesh: SequenceMesh) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(_device(mesh)).set_rng_state(states[1])


def _max_over_ranks(numbers: Tensor, mesh: SequenceMesh) -> Tensor:
    moved = numbers.to(_device(mesh))
    if mesh.size > 1:
        dist.all_reduce(moved, dist.ReduceOp.MAX, group=_group(mesh))
    return moved.cpu()


def _group(mesh: SequenceMesh) -> Any:
    return _resolve_process_group(mesh.groups["sp"])  # type: ignore[arg-type]


def _device(mesh: SequenceMesh) -> torch.device:
    """Where the group's backend communicates."""
    kind = "cpu" if mesh.device_mesh is None else mesh.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
