"""One emitted program: what it takes and returns, when it may be used, and how it runs."""

import io
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from seqpar.errors import UnsupportedError
from seqpar.passes.guards import InputSizes, input_sizes
from seqpar.passes.read_guard import ReadGuard
from seqpar.passes.state import Mutation, StateWrite
from seqpar.passes.trace import Traced


@dataclass(frozen=True)
class Interface:
    """What a program takes and returns, and when it may be used: all that is needed of a trace once the program is emitted.

    sizes: of the inputs. out_spec: pytree spec of the model's result, whose leaves are the first outputs; mutations, states: what the
    others are. guard: the values the model reads from its inputs. seconds: what making the program took.
    """

    sizes: InputSizes
    symbolic: bool
    out_spec: Any
    mutations: tuple[Mutation, ...] = ()
    states: tuple[StateWrite, ...] = ()
    guard: ReadGuard | None = None
    seconds: float = 0.0

    @staticmethod
    def of(traced: Traced, conditions: Iterable[sympy.Basic] = ()) -> "Interface":
        """conditions: what the partition assumed about the sizes."""
        symbolic = traced.shape_env is not None
        return Interface(input_sizes(traced, conditions), symbolic, traced.out_spec, traced.mutations, traced.states, traced.guard, traced.seconds)


@dataclass(frozen=True)
class Saved:
    """Where in a file a program came from: with the programs of the other ranks, which this process has not. file: all its bytes, compressed."""

    file: bytes
    name: str

    def members(self, name: str) -> dict[str, bytes]:
        """All that belongs to the program, under another name."""
        with zipfile.ZipFile(io.BytesIO(self.file)) as archive:
            own = [member for member in archive.namelist() if member.startswith((f"{self.name}.", f"{self.name}/"))]
            return {name + member.removeprefix(self.name): archive.read(member) for member in own}


@dataclass(frozen=True)
class Program:
    """One emitted program. traced: what it was made from; saved: the file it came from instead.

    Shapes: `run` takes the global tensors of the placeholders of `gm` and returns the flat outputs of the model, whole.
    """

    interface: Interface
    gm: fx.GraphModule
    run: Callable[..., Sequence[Any]]
    plan: Any
    split: bool = False  # over several ranks
    rank: int = 0  # whose program it is, in the sequence mesh
    traced: Traced | None = None
    saved: Saved | None = None

    @property
    def symbolic(self) -> bool:
        """True if other input sizes can use it."""
        return self.interface.symbolic

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """True if the values the model reads from these tensors (placeholder order) are those the program is made for."""
        guard = self.interface.guard
        return guard is None or guard.holds([tensor.contiguous() for tensor in tensors])


class RefuseBackward(torch.autograd.Function):
    """Identity whose backward is an error: gradients would have to be exchanged between ranks."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs, attached to `anchor` (a tensor that requires grad)."""
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Raise."""
        raise UnsupportedError(
            "gradients through a program that is split over several ranks are not supported (this version is for inference): run the "
            "model itself, or sp_compile with ulysses=1, ring=1"
        )


def without_gradients(run: Callable[..., Sequence[Any]], inputs: Sequence[Any], parameters: Iterable[torch.Tensor]) -> Sequence[Any]:
    """Run forward only; outputs that would require grad raise in backward, so that no gradient is silently missing."""
    with torch.no_grad():
        outputs = list(run(*inputs))
    anchor = next((tensor for tensor in (*inputs, *parameters) if isinstance(tensor, torch.Tensor) and tensor.requires_grad), None)
    floating = [i for i, out in enumerate(outputs) if isinstance(out, torch.Tensor) and (out.is_floating_point() or out.is_complex())]
    if anchor is not None and floating:
        attached = RefuseBackward.apply(anchor, *(outputs[i] for i in floating))
        for index, out in zip(floating, attached, strict=True):
            outputs[index] = out
    return outputs


def run_program(program: Program, inputs: Sequence[torch.Tensor], model: torch.nn.Module) -> Sequence[Any]:
    """Run with grad mode on: one rank's whole program is differentiable, a split one runs forward only."""
    return without_gradients(program.run, inputs, model.parameters()) if program.split else program.run(*inputs)


def check_apart(interface: Interface, tensors: Sequence[torch.Tensor]) -> None:
    """Refuse an input that the model writes to and that lies where another input does: the program computes with the other one as it was."""
    places = [(tensor.data_ptr(), tensor.data_ptr() + 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) * tensor.itemsize) for tensor in tensors]
    for index in (mutation.placeholder for mutation in interface.mutations if mutation.placeholder is not None):
        start, stop = places[index]
        if any(i != index and tensors[i].numel() and start < places[i][1] and places[i][0] < stop for i in range(len(tensors))):
            raise UnsupportedError(f"the model writes to an input of shape {tuple(tensors[index].shape)} that shares its memory with another input: pass a copy of one of them (`.clone()`)")


def write_back(interface: Interface, outputs: Sequence[Any], tensors: Sequence[torch.Tensor], model: torch.nn.Module) -> None:
    """Copy the new contents of buffers and inputs the model writes to where they belong."""
    with torch.no_grad():
        for mutation in interface.mutations:
            target = model.get_buffer(mutation.buffer) if mutation.buffer is not None else tensors[mutation.placeholder]  # type: ignore[index]
            target.copy_(outputs[mutation.output])
