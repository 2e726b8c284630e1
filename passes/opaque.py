"""Modules whose Python code depends on activations, made leaves of the trace.

Before: `counts = chosen.bincount().cpu().numpy()` in a routing module: another program in every call
After:  the module is one node that runs its own `forward` on whole values (`runtime/opaque.py`); the rest of the model is traced as ever

Which modules: for each read that no guard can cover, the innermost module whose `forward` was running, or the next one around it
if its arguments or results are no tensors. They are recorded in an eager run: arguments, shapes of the results, work. A module that does
more than return its results is refused.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from seqpar.compat import pytree
from seqpar.errors import PlanError, TraceError
from seqpar.partitioner.op import Op
from seqpar.passes.arguments import Call
from seqpar.passes.effects import RandomState, StateWatch, version, writes
from seqpar.passes.read_guard import ActivationRead, Unguarded, refusal, stirred
from seqpar.passes.replay import Record, Recorder, example
from seqpar.passes.warm import restored, warm_up
from seqpar.runtime.opaque import Form, OpaqueCall, autocast_state, run_opaque

PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
HALF = 1e-2  # how much the result for half of the tokens may differ: other kernels, and experts that two tokens are nearly tied for
Forward = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
# The counter knows the kernels of accelerators only.
ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}


@dataclass(frozen=True)
class Recording:
    """What an eager run of the example tells the tracer: the values read, and the calls of modules that run as they are, in order."""

    reads: tuple[Record, ...] = ()
    calls: tuple[OpaqueCall, ...] = ()


class Unfit(Exception):
    """A module cannot be a leaf; the one around it may."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


# ---- recording -----------------------------------------------------------------------------------


class OpaqueRecorder:
    """Runs the chosen modules as they are and notes their calls; the values they read are theirs alone."""

    def __init__(self, model: torch.nn.Module, choice: Choice, reader: Recorder) -> None:
        chosen = self.chosen = choice.chosen
        self.by_token, self.reader = choice.by_token, reader
        self.kinds = {name: type(model.get_submodule(name)).__qualname__ for name in chosen}
        self.states = {name: StateWatch(model.get_submodule(name)) for name in chosen}
        self.calls: list[OpaqueCall] = []
        self.unfit: dict[str, str] = {}

    def __call__(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.reader.idle:  # inside another one
            return forward(*args, **kwargs)
        self.reader.idle = True
        try:
            return self.record(name, forward, args, kwargs)
        except Unfit as unfit:  # go on, to find all of them in one run
            self.unfit[name] = unfit.why
            return forward(*args, **kwargs)
        finally:
            self.reader.idle = False

    def record(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, in_spec = pytree.tree_flatten((args, kwargs))
        check([leaf for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))], "takes")
        if (changed := self.states[name].changed()) is not None:
            raise self.refuse(name, f"the model changes {changed} of it during the call")
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        versions, random = [version(tensor) for tensor in tensors], RandomState(tensors)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            returned = forward(*args, **kwargs)
        why = writes(self.states[name], tensors, versions, leaves, pytree.tree_leaves((args, kwargs)), random)
        if why is not None:
            raise self.refuse(name, why)
        found, out_spec = pytree.tree_flatten(returned)
        check([leaf for leaf in found if leaf is not None and not isinstance(leaf, Tensor)], "returns")
        if not steady(forward, leaves, in_spec, found):
            raise Unfit("returns other shapes for other contents of its inputs")
        if name in self.by_token:
            check_tokens(f"{name} ({self.kinds[name]})", forward, leaves, in_spec, found)
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        self.calls.append(
            OpaqueCall(
                name, self.kinds[name], self.chosen[name].record.function, self.chosen[name].record.where, in_spec,
                tuple(None if i in places else leaf for i, leaf in enumerate(leaves)), places, tuple(map(Form.of, tensors)),
                out_spec, tuple(None if leaf is None else Form.of(leaf) for leaf in found), counter.get_total_flops(), autocast_state(tensors), name in self.by_token,
            )  # fmt: skip
        )
        return returned

    def refuse(self, name: str, why: str) -> ActivationRead:
        return refusal(self.chosen[name].record, f"{self.chosen[name].why}; and {name} ({self.kinds[name]}) cannot run as it is inside a program: {why}")


def check(others: Sequence[Any], verb: str) -> None:
    if others:
        raise Unfit(f"{verb} a {type(others[0]).__name__}, not only tensors")


def steady(forward: Callable[..., Any], leaves: Sequence[Any], spec: Any, returned: Sequence[Any]) -> bool:
    """False if the shapes of the results change with the content of floating arguments (one other content is tried; every call checks)."""
    args, kwargs = pytree.tree_unflatten([stirred(leaf) for leaf in leaves], spec)
    try:
        again = pytree.tree_leaves(forward(*args, **kwargs))
    except Exception:  # such content may mean nothing to it
        return True
    return [leaf.shape for leaf in again if isinstance(leaf, Tensor)] == [leaf.shape for leaf in returned if isinstance(leaf, Tensor)]


def check_tokens(title: str, forward: Callable[..., Any], leaves: Sequence[Any], spec: Any, returned: Sequence[Any]) -> None:
    """Raise PlanError if the module cannot treat tokens alone: another result for half of them, or one that has no tokens."""
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    tokens = None if first is None or first.ndim < 2 else first.shape[:-1]
    if tokens is None or any(leaf is not None and leaf.shape[:-1] != tokens for leaf in returned):
        shapes = ", ".join(str(list(leaf.shape)) for leaf in returned if leaf is not None)
        raise PlanError(f"{title} is declared ByToken, and returns {shapes} for {'no tensor' if first is None else list(first.shape)}: all dims but the last must be the same")
    half = (tokens[-1] + 1) // 2
    args, kwargs = pytree.tree_unflatten([leaf[..., :half, :].contiguous() if isinstance(leaf, Tensor) and leaf.shape[:-1] == tokens else leaf for leaf in leaves], spec)
    for alone, together in zip(pytree.tree_leaves(forward(*args, **kwargs)), returned, strict=True):
        if together is not None and not torch.allclose(alone, together[..., :half, :], rtol=HALF, atol=HALF * together.abs().max().item()):
            raise PlanError(f"{title} is declared ByToken, and its result for the first half of the tokens is not half of its result: they are not treated alone. Leave the entry out")


def record_opaque(model: torch.nn.Module, call: Call, choice: Choice) -> tuple[Exception | None, Recording, dict[str, str]]:
    """Run the example with the chosen modules as leaves; the model is left as it was.

    Returns the exception the run failed with, if any, what was recorded, and which modules cannot be leaves (name -> why).
    """
    reader = Recorder(model)
    handler: list[OpaqueRecorder] = []
    with restored(model), forwards(model, choice.chosen, lambda *given: handler[0](*given)):
        handler.append(OpaqueRecorder(model, choice, reader))  # sees the modules as they are during the run
        failure = warm_up(model, *example(call), watch=reader)
    return failure, Recording(tuple(reader.records), tuple(handler[0].calls)), handler[0].unfit


@contextmanager
def forwards(model: torch.nn.Module, names: Mapping[str, Any], handler: Forward) -> Iterator[None]:
    """Send the `forward` of the named modules to `handler(name, forward, args, kwargs)`; hooks stay outside."""
    kept = []
    try:
        for name in names:
            module = model.get_submodule(name)
            kept.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = redirected(name, module.forward, handler)
        yield
    finally:
        for module, own in kept:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def redirected(name: str, forward: Callable[..., Any], handler: Forward) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return handler(name, forward, args, kwargs)

    return call


class Choice:
    """Which modules are leaves: name -> the read that made it one."""

    def __init__(self, by_token: Collection[str] = ()) -> None:
        """by_token: modules that treat every token alone; of those around a read they go before others."""
        self.by_token = by_token
        self.chosen: dict[str, Unguarded] = {}
        self.unfit: dict[str, str] = {}

    def add(self, refused: ActivationRead) -> None:
        """Choose a module for each refused read.

        Raises:
            ActivationRead: there is none left but the whole model.
        """
        for name in {name for read in refused.reads for name in read.record.modules} & self.chosen.keys():
            self.unfit[name] = "is not only called as a module"
            del self.chosen[name]
        for read in refused.reads:
            self.choose(read)

    def drop(self, unfit: Mapping[str, str]) -> None:
        """Choose the modules around those that are unfit (name -> why)."""
        self.unfit.update(unfit)
        for read in [self.chosen.pop(name) for name in unfit]:
            self.choose(read)

    def choose(self, read: Unguarded) -> None:
        modules = read.record.modules
        fit = [name for name in modules if name and name not in self.unfit]
        name = next((name for name in fit if name in self.by_token), fit[0] if fit else None)
        if name is None:
            tried = "; ".join(f"{name} {self.unfit[name]}" for name in modules if name in self.unfit)
            raise refusal(read.record, f"{read.why}; and no module around it can run as it is: {tried}" if tried else read.why)
        self.chosen.setdefault(name, read)


# ---- tracing -------------------------------------------------------------------------------------


@torch.library.custom_op("seqpar::opaque_module", mutates_args=())
def opaque_module(inputs: list[Tensor], form: str) -> list[Tensor]:
    """Stands for a module while the tracer runs. `form`: JSON of the call's number and the results' shapes, dtypes and devices."""
    raise AssertionError("opaque_module is only traced; programs call run_opaque")


@opaque_module.register_fake
def _(inputs: list[Tensor], form: str) -> list[Tensor]:
    return [torch.empty(shape, dtype=getattr(torch, dtype), device=device) for shape, dtype, device in json.loads(form)["results"]]


class OpaqueReplayer:
    """Active while tracing: puts a node in place of each recorded call, in order."""

    def __init__(self, model: torch.nn.Module, calls: Sequence[OpaqueCall]) -> None:
        self.model, self.calls = model, tuple(calls)
        self.waiting: dict[str, list[int]] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Around one run of the model; torch.export makes more than one."""
        self.waiting = defaultdict(list)
        for number, call in enumerate(self.calls):
            self.waiting[call.name].append(number)
        with forwards(self.model, dict.fromkeys(self.waiting), self):
            yield

    def __call__(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self.waiting[name]:
            raise TraceError(f"{name} is called once more than in the eager run of the example")
        number = self.waiting[name].pop(0)
        call = self.calls[number]
        plain = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if spec != call.in_spec or plain != call.arguments or tuple(map(Form.of, tensors)) != call.inputs:
            raise TraceError(f"{name} is called with other arguments than in the eager run of the example")
        device = str(tensors[0].device if tensors else "cpu")
        results = [(form.shape, str(form.dtype).removeprefix("torch."), device) for form in call.outputs if form is not None]
        found = iter(opaque_module(tensors, json.dumps({"call": number, "results": results})))
        return pytree.tree_unflatten([None if form is None else next(found) for form in call.outputs], call.out_spec)


def emit_opaque(graph: fx.Graph, node: fx.Node, calls: Sequence[OpaqueCall], constants: dict[str, Any], new: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """The node that runs the module, in place of one of `opaque_module`."""
    number = json.loads(node.args[1])["call"]  # type: ignore[arg-type]
    call, attribute = calls[number], f"_opaque_{number}"
    constants[attribute] = call
    tensors = tuple(new(tensor) for tensor in node.args[0])  # type: ignore[union-attr, arg-type]
    made = graph.call_function(run_opaque, (graph.get_attr(attribute), graph.get_attr(call.name), tensors))
    made.meta = {"val": node.meta["val"], "opaque": call, "flops": call.flops}
    if call.by_token:
        made.meta["rule"] = tokens_alone
    return made


def tokens_alone(op: Op) -> None:
    """The rule of a module that treats every token alone; an operand without tokens is whole."""
    call = op.node.meta["opaque"]
    for i, form in enumerate(Form.of(n.meta["val"]) for n in op.operands):
        if form.shape[:-1] == call.tokens:
            op.carry_all(i, skip=(-1,))
    op.reason = "the module needs all channels of a token"


def is_opaque(node: fx.Node) -> bool:
    return node.target is opaque_module._opoverload


def opaque_calls(graph: fx.Graph) -> tuple[OpaqueCall, ...]:
    """The calls of modules that a traced graph runs as they are."""
    return tuple(node.meta["opaque"] for node in graph.nodes if node.target is run_opaque)
