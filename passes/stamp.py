"""Run one of the calls that are alike, and copy what it did for the others.

Before: for block in blocks: x = block(x, t)          # sixty blocks, run by Python through every layer of AOTAutograd, twice
After:  the first run (noting nothing) runs one of them, the second two; of the others the inputs are looked at, and the nodes are copied

Two calls are alike if their blocks are (`repeated.py`), with equal arguments up to the content of tensors, in the same state of torch, from the same line. A
block that runs for others is given tensors of its own in place of its arguments and weights, so that its nodes show what it depends on. It counts only if it
depends on nothing else, writes to nothing, changes no Python state, returns new tensors, and if the next one like it, which runs too, makes the same nodes.

Whatever else happens ends the trace (`GaveUp`), and another begins in which these blocks run as usual.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx

from seqpar.compat import (
    Tape,
    active_modes,
    fresh_tensors,
    functional_mode,
    has_global_hooks,
    is_traced,
    pytree,
    unscoped_call,
    was_written,
)
from seqpar.passes.effects import StateWatch
from seqpar.passes.module_calls import module_calls
from seqpar.passes.opaque import PLAIN
from seqpar.passes.region import SIZES, Region, described, is_usual, layout, size
from seqpar.passes.repeated import Block, SurroundingsWatch, alike


class GaveUp(Exception):  # noqa: N818 - an answer, not an error
    """Blocks of this kind must run as usual; all of them if it is empty."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


@dataclass(frozen=True)
class BlockCall:
    """A call of a block. tensors: its distinct inputs (arguments, then weights). what, where: equal for calls that are alike."""

    block: Block
    leaves: tuple[Any, ...]
    spec: Any
    tensors: tuple[Tensor, ...]
    what: Any
    where: Any


@dataclass(frozen=True)
class Passed:
    """An output that is the input `index`."""

    index: int


@dataclass
class Known:
    """What calls that are alike do.

    outputs: leaves of the result: `Passed`, a new tensor or a plain value. region, form: what the latest of them made (the second run only). ready: others
    may be copied.
    """

    call: BlockCall
    spec: Any = None
    outputs: tuple[Any, ...] = ()
    region: Region | None = None
    form: Any = None
    ready: bool = False


class Stamper:
    """Active while AOTAutograd runs a model, twice. blocks: those that may be copied, by the identity of their dictionary."""

    def __init__(self, model: torch.nn.Module, position: Callable[[], int], root: CodeType) -> None:
        """position: how many values were read from tensors. root: the code that calls the model."""
        self.model, self.position, self.root = model, position, root
        self.blocks = {} if has_global_hooks() else {id(block.module.__dict__): block for block in alike(model)}
        self.first: Run | None = None

    def exclude(self, kind: str) -> None:
        """Blocks of this kind run as usual from now on; all do if it is empty."""
        self.blocks = {place: block for place, block in self.blocks.items() if kind and block.kind != kind}

    @contextmanager
    def active(self) -> Iterator[Run | None]:
        """Around one run of the model."""
        if functional_mode() is None:
            yield None
            return
        run = Run(self, self.blocks)
        with module_calls(run) as run.calls_again:
            yield run
        if run.tape is None:
            self.first = run


class Run:
    """One run of a model, with `tape` where its operators are noted."""

    def __init__(self, stamper: Stamper, blocks: dict[int, Block]) -> None:
        self.stamper, self.blocks = stamper, blocks
        self.tape, self.mode = Tape.running(), functional_mode()
        self.states = {place: StateWatch(block.module) for place, block in blocks.items()}
        self.surroundings = {block.kind: SurroundingsWatch(block.surroundings) for block in blocks.values()}
        self.known: list[Known] = []
        self.results: list[tuple[str, Any]] = []  # of every call: path and outputs
        self.noted: list[Noted] = []
        self.made: list[tuple[str, Tensor]] = []
        self.inside = False
        self.calls_again: Callable[[], None] = lambda: None

    def __call__(self, module: torch.nn.Module, usual: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of any module."""
        block = self.blocks.get(id(module.__dict__))
        if block is None or self.inside or functional_mode() is not self.mode or not self.is_noted():
            return usual(module, *args, **kwargs)
        with unseen():
            call = self.described(block, args, kwargs)
            known = None if call is None else self.known_of(call)
        if call is None or known is None:
            self.note(block, None)
            return usual(module, *args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            if not known.ready:
                return self.watched(known, call, module)
            with unseen():
                return self.repeated(known, call)

        return run(*args, **kwargs) if self.tape is None else self.tape.scoped(module, run, args, kwargs)

    # ---- what a call is

    def described(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockCall | None:
        """None for a call that is like no other: an argument that is no tensor, size or plain value, a state that has changed."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        weights = [names[name] for names, name in block.slots]
        if not all(isinstance(leaf, (Tensor, torch.SymInt, *PLAIN)) for leaf in leaves) or torch.is_grad_enabled():
            return None
        tensors = list({id(leaf): leaf for leaf in (*leaves, *weights) if isinstance(leaf, Tensor)}.values())
        if not all(map(is_usual, tensors)) or self.states[id(block.module.__dict__)].changed() or self.surroundings[block.kind].changed():
            return None
        place = {id(tensor): i for i, tensor in enumerate(tensors)}
        plain = tuple(place[id(leaf)] if isinstance(leaf, Tensor) else (type(leaf), leaf.node.expr if isinstance(leaf, SIZES) else repr(leaf)) for leaf in leaves)
        shapes = tuple((described(tensor), getattr(tensor, "_is_param", False)) for tensor in tensors)
        what = (block.kind, spec, plain, tuple(place[id(weight)] for weight in weights), shapes, state_of_torch(tensors))
        return BlockCall(block, tuple(leaves), spec, tuple(tensors), what, (active_modes(), lines_above(self.stamper.root)))

    def is_noted(self) -> bool:
        """False inside a function of a higher-order operator."""
        now = Tape.running()
        return now is self.tape if now is None or self.tape is None else now.graph is self.tape.graph

    def known_of(self, call: BlockCall) -> Known:
        """What calls like this one do."""
        for known in self.known:
            if (known.call.what, known.call.where) == (call.what, call.where):
                return known
        self.known.append(Known(call))
        return self.known[-1]

    # ---- one that runs

    def watched(self, known: Known, call: BlockCall, module: torch.nn.Module) -> Any:
        """Run a block on tensors of its own, and see what it does."""
        with unseen():
            inputs = fresh_tensors(call.tensors)
            layouts = list(map(layout, inputs))
            noted = None if self.tape is None else Noted.begin(self.tape, call, inputs)
        returned = self.on(inputs, call, module)
        with unseen():
            # Compared now, since a block may find out that a symbol is a number.
            if any(map(was_written, inputs)) or [list(map(size, sizes)) for sizes in layouts] != [list(map(size, layout(tensor))) for tensor in inputs]:
                raise GaveUp(call.block.kind, f"{call.block.path} writes to its inputs")
            return self.seen(known, call, inputs, returned, noted)

    def seen(self, known: Known, call: BlockCall, inputs: Sequence[Tensor], returned: Any, noted: Noted | None) -> Any:
        """Learn from a block that has run, and give its results to the model."""
        if self.states[id(call.block.module.__dict__)].changed() or self.surroundings[call.block.kind].changed():
            raise GaveUp(call.block.kind, f"{call.block.path} changes Python state")
        found, spec = pytree.tree_flatten(returned)
        outputs = self.outputs_of(found, inputs, call)
        new = [output for output in outputs if isinstance(output, Tensor)]
        if noted is not None:
            self.compare(known, noted.end(new))
        results = fresh_tensors(new)
        if noted is None:
            known.ready = True
        else:
            noted.replace(results)
            self.noted.append(noted)
        fresh = iter(results)
        known.spec, known.outputs = spec, tuple(next(fresh) if isinstance(output, Tensor) else output for output in outputs)
        return self.result(known.outputs, spec, call)

    def on(self, inputs: Sequence[Tensor], call: BlockCall, module: torch.nn.Module) -> Any:
        """The block's result for other tensors. Raises GaveUp if it replaces them, changes its arguments or reads values."""
        other = {id(tensor): fresh for tensor, fresh in zip(call.tensors, inputs, strict=True)}
        leaves = [other.get(id(leaf), leaf) for leaf in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        weights = [names[name] for names, name in call.block.slots]
        position = self.stamper.position()
        self.inside = True
        try:
            for (names, name), weight in zip(call.block.slots, weights, strict=True):
                names[name] = other[id(weight)]
            returned = unscoped_call(module, *args, **kwargs)
            kept = all(names.get(name) is other[id(weight)] for (names, name), weight in zip(call.block.slots, weights, strict=True))
        finally:
            for (names, name), weight in zip(call.block.slots, weights, strict=True):
                names[name] = weight
            self.inside = False
            self.calls_again()
        after, spec = pytree.tree_flatten((args, kwargs))
        why = (
            "reads values" if self.stamper.position() != position
            else "assigns a weight" if not kept
            else "changes its arguments" if spec != call.spec or any(a is not b for a, b in zip(after, leaves, strict=True))
            else None
        )  # fmt: skip
        if why is not None:
            raise GaveUp(call.block.kind, f"{call.block.path} {why}")
        return returned

    def outputs_of(self, found: Sequence[Any], inputs: Sequence[Tensor], call: BlockCall) -> list[Any]:
        """Inputs by index, new tensors and plain values. Raises GaveUp for other results, and views of inputs.

        New tensors may share memory: that only shows if one of them is written to, which `finish` looks for.
        """
        place = {id(tensor): i for i, tensor in enumerate(inputs)}
        outputs = [Passed(place[id(leaf)]) if id(leaf) in place else leaf for leaf in found]
        memory = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [leaf for leaf in outputs if isinstance(leaf, Tensor)]
        if not all(isinstance(leaf, (Passed, *PLAIN)) or (isinstance(leaf, Tensor) and is_usual(leaf)) for leaf in outputs):
            raise GaveUp(call.block.kind, f"{call.block.path} returns more than tensors")
        if len(set(map(id, new))) < len(new) or any(tensor.untyped_storage()._cdata in memory for tensor in new):
            raise GaveUp(call.block.kind, f"{call.block.path} returns a view of an input, or one tensor twice")
        return outputs

    def compare(self, known: Known, region: Region) -> None:
        """Calls may be copied once two have made the same nodes. Raises GaveUp if they depend on more than the inputs."""
        other = region.depends_on()
        if other is not None:
            raise GaveUp(known.call.block.kind, f"{known.call.block.path} depends on {other.name}, which is no input of it")
        form = region.form()
        known.ready = form is not None and form == known.form
        known.region, known.form = region, form

    # ---- one that is copied

    def repeated(self, known: Known, call: BlockCall) -> Any:
        """The result of a call like one that ran."""
        given = [output for output in known.outputs if isinstance(output, Tensor)]
        fresh = fresh_tensors(given)
        if self.tape is not None:
            assert known.region is not None
            nodes = nodes_of(self.tape, call, call.tensors)
            for tensor, node in zip(fresh, known.region.copy(self.tape, nodes), strict=True):
                self.tape.stand_for(tensor, node, sizes=True)
        new = iter(fresh)
        return self.result(tuple(next(new) if isinstance(output, Tensor) else output for output in known.outputs), known.spec, call)

    def result(self, outputs: tuple[Any, ...], spec: Any, call: BlockCall) -> Any:
        self.made += [(call.block.kind, output) for output in outputs if isinstance(output, Tensor)]
        self.note(call.block, outputs)
        return pytree.tree_unflatten([call.tensors[output.index] if isinstance(output, Passed) else output for output in outputs], spec)

    # ---- the whole run

    def note(self, block: Block, outputs: tuple[Any, ...] | None) -> None:
        """Remember a call. Raises GaveUp if it is not the same in both runs: AOTAutograd takes what results are from the first."""
        index = len(self.results)
        self.results.append((block.path, outputs))
        if self.tape is None:
            return
        earlier = self.stamper.first.results[index : index + 1] if self.stamper.first is not None else []
        if [(path, shapes_of(given)) for path, given in earlier] != [(block.path, shapes_of(outputs))]:
            raise GaveUp("", f"{block.path} differs between the two runs")

    def finish(self, returned: Sequence[Any]) -> None:
        """The model has run. Raises GaveUp if something a block made was written to or used in ways that its copies do not show."""
        with unseen():
            self.check(returned)

    def check(self, returned: Sequence[Any]) -> None:
        for kind, tensor in self.made:
            if was_written(tensor):
                raise GaveUp(kind, "a result is written to")
        if self.tape is None:
            return
        nodes = {self.tape.node_of(tensor) for tensor in returned if isinstance(tensor, Tensor) and is_traced(tensor)}
        for noted in self.noted:
            inner = {line.node for line in noted.region.lines} - set(noted.region.outputs)
            if noted.region.used_by() is not None or any(node.users for node in noted.stand_ins) or nodes & {*inner, *noted.stand_ins}:
                raise GaveUp(noted.call.block.kind, f"what {noted.call.block.path} computes is used elsewhere")
            for node in noted.stand_ins:
                self.tape.graph.erase_node(node)
        if len(self.results) != (0 if self.stamper.first is None else len(self.stamper.first.results)):
            raise GaveUp("", "blocks are not called as often in the second run")


class Noted:
    """The nodes that a call makes while it runs on tensors of its own."""

    region: Region

    def __init__(self, tape: Tape, call: BlockCall, nodes: list[fx.Node], stand_ins: list[fx.Node]) -> None:
        """nodes: of the inputs. stand_ins: nodes in their place."""
        self.tape, self.call, self.nodes, self.stand_ins = tape, call, nodes, stand_ins
        self.last, self.calls = next(iter(reversed(tape.graph.nodes))), dict(tape.calls)

    @staticmethod
    def begin(tape: Tape, call: BlockCall, inputs: Sequence[Tensor]) -> Noted:
        nodes, stand_ins = nodes_of(tape, call, call.tensors), []
        for tensor, node in zip(inputs, nodes, strict=True):
            stand_in = tape.graph.create_node("call_function", input_of_block, (node,), {}, name="seqpar_input")
            stand_in.meta = dict(node.meta)
            tape.stand_for(tensor, stand_in, sizes=False)
            stand_ins.append(stand_in)
        return Noted(tape, call, nodes, stand_ins)

    def end(self, outputs: Sequence[Tensor]) -> Region:
        """The call has returned these new tensors."""
        results = nodes_of(self.tape, self.call, outputs)
        nodes, node = [], self.last.next
        while node.op != "root":
            nodes.append(node)
            node = node.next
        self.region = Region(nodes, self.stand_ins, results, self.tape.modules, (self.calls, dict(self.tape.calls)))
        return self.region

    def replace(self, results: Sequence[Tensor]) -> None:
        """Let the nodes refer to the real inputs, and tensors outside to the nodes of the results."""
        for stand_in, node in zip(self.stand_ins, self.nodes, strict=True):
            stand_in.replace_all_uses_with(node)
        for tensor, node in zip(results, self.region.outputs, strict=True):
            self.tape.stand_for(tensor, node, sizes=True)


def input_of_block(value: Any) -> Any:
    """Stands for an input while a block is noted; gone when the model has run."""
    return value


def unseen() -> AbstractContextManager[Any]:
    """In the block, functions are seen by no mode: questions about shapes are many, and no part of the model."""
    return torch._C.DisableTorchFunction()


def nodes_of(tape: Tape, call: BlockCall, tensors: Sequence[Tensor]) -> list[fx.Node]:
    """The nodes of inputs or outputs. Raises GaveUp if one has none."""
    nodes = [node for node in map(tape.node_of, tensors) if node is not None]
    if len(nodes) < len(tensors):
        raise GaveUp(call.block.kind, f"{call.block.path} takes or returns a tensor that no operator made")
    return nodes


def shapes_of(outputs: tuple[Any, ...] | None) -> Any:
    return None if outputs is None else [described(output) for output in outputs]


def state_of_torch(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What operators depend on besides their arguments."""
    kinds = sorted({tensor.device.type for tensor in tensors} - {"meta"} | {"cpu"})
    casts = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    kernels = tuple(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math", "cudnn"))
    return casts, kernels, torch.is_inference_mode_enabled(), torch.get_default_dtype()


def lines_above(root: CodeType) -> tuple[tuple[int, int], ...]:
    """The lines that led here from a call of `root`: a node says from which line its module was called."""
    lines, frame = [], sys._getframe()
    above: FrameType | None = frame
    while above is not None and above.f_code is not root:
        lines.append((id(above.f_code), above.f_lineno))
        above = above.f_back
    return tuple(lines)
