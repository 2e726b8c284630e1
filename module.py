"""The module `sp_compile` returns: the model's face, and a program per call signature behind it."""

import functools
import inspect
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from seqpar.compat import pytree
from seqpar.errors import UnsupportedError
from seqpar.model_watch import Watches
from seqpar.passes.arguments import Call, resolved
from seqpar.passes.readable import readable
from seqpar.program import Program, check_apart, run_program, write_back
from seqpar.signature import Key, Signature, differences, fixed_part, read, summary

log = logging.getLogger("seqpar.compile")

# A method of the model with one of these in its name may replace layers or change numbers that are part of a program.
CHANGES_MODEL = ("lora", "adapter", "fuse", "load", "quant", "set_", "enable_", "disable_", "register_", "apply")

MAX_ALTERNATIVES = 16  # programs of one signature, for different values the model reads from its inputs


class Builder(Protocol):
    """Makes programs; the same calls are made on every rank, in the same order."""

    def build(self, call: Call, *, static: bool) -> Program:
        """Trace, partition and bind for the sizes of `call`; `static`: an earlier program had no symbols."""

    def reuse(self, call: Call) -> None:
        """Check that all ranks reuse their program for `call`."""


@dataclass(eq=False)
class Specialisation:
    """A program for one signature: from the tensors of a call to the model's result.

    Where the model reads values from tensors there are programs for several values; `program` is the latest used, `others` the rest.
    """

    program: Program
    key: Key
    summary: dict[str, str]
    used: int = 0
    orders: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    others: list[Program] = field(default_factory=list)

    @property
    def programs(self) -> list[Program]:
        """All programs, the latest used first."""
        return [self.program, *self.others]

    def choose(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Make the program for the values in these tensors the current one; False if there is none."""
        for program in self.programs:
            if program.fits(tensors):
                self.use(program)
                return True
        return False

    def use(self, program: Program, limit: int = MAX_ALTERNATIVES) -> None:
        """Make `program` the current one; the one unused for longest is forgotten above `limit`."""
        if program is not self.program:
            rest = [other for other in self.programs if other is not program]
            self.program, self.others = program, rest[: limit - 1]

    def __call__(self, tensors: Sequence[torch.Tensor], model: torch.nn.Module, arguments: Mapping[str, Any] | None = None) -> Any:
        interface = self.program.interface
        inputs = [tensor if tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()) else resolved(tensor).contiguous() for tensor in tensors]
        if interface.mutations:
            check_apart(interface, tensors)
        outputs = run_program(self.program, inputs, model) if torch.is_grad_enabled() else self.program.run(*inputs)
        if interface.mutations:
            write_back(interface, outputs, tensors, model)
        for write in interface.states:
            write.apply(arguments[write.argument], tensors, outputs)  # type: ignore[index]
        return pytree.tree_unflatten(list(outputs[: interface.out_spec.num_leaves]), interface.out_spec)


@dataclass(frozen=True)
class Loaded:
    """What a module starts with instead of compiling an example. Invariants: `specialisations` is not empty, the latest used first."""

    signature: Signature
    specialisations: Sequence[Specialisation]

    def __post_init__(self) -> None:
        assert self.specialisations


class SequenceParallelModule(torch.nn.Module):
    """A drop-in replacement for a model that runs sequence-parallel programs.

    It takes and returns full (global) tensors on every rank. Parameters, buffers, `state_dict`, `config`, `dtype`, methods: all the
    model's own. A new combination of shapes, dtypes and values reuses a symbolic program or makes a new one, on all ranks together.
    Weights and buffers are shared. What else decides the result (a scale, a flag, hooks, which layers there are) is part of a program: if it was changed on the model,
    the next call makes the programs anew. Not seen are global variables and what functions close over: after a change there call `recompile()`.

    A call raises `SignatureError` if its inputs have another structure than the example, and `TraceError`, `MeshError` or
    `DisagreementError` if a new program was needed and could not be made.
    """

    def __init__(
        self, model: torch.nn.Module, builder: Builder, args: Sequence[Any], kwargs: Mapping[str, Any], *, max_programs: int = 32, loaded: Loaded | None = None
    ):
        super().__init__()
        del self.__dict__["training"]  # the model's own, through __getattr__
        for shared in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[shared] = model.__dict__[shared]
        state = {
            "_model": model,
            "_builder": builder,
            "_signature": Signature(inspect.signature(model.forward), args, kwargs) if loaded is None else loaded.signature,
            "_max_programs": max_programs,
            "_programs": OrderedDict(),
            "_fast": {},
            "_clock": itertools.count(1),
            "_current": None,
            "_probe": first_parameter(model),
            "_watches": Watches(model),
        }
        self.__dict__.update(state)
        self.__dict__["forward"] = model_forward(self, model)
        if loaded is None:
            self._current = self._specialise(args, kwargs, None)
        else:
            self._programs.update((found.key, found) for found in loaded.specialisations)
            self._current = loaded.specialisations[0]
            self._watches.renew(*(found.program.gm.graph for found in loaded.specialisations))

    # ---- calling

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        watch = self._watches.of_mode.get(self._model.training)
        if watch is not None and watch.changed() and self._watches.must_renew(watch):
            self.recompile()
        key: list[Any] = [len(args), tuple(kwargs)]
        self._state_key(key)
        tensors: list[torch.Tensor] = []
        for value in args:
            read(value, key, tensors)
        for value in kwargs.values():
            read(value, key, tensors)
        found = self._fast.get(tuple(key))
        if found is None:
            specialisation = self._specialise(args, kwargs, tuple(key))
            order = specialisation.orders.get(tuple(key))
            if order is None:
                inputs = [leaf for leaf in self._signature.canonical(args, kwargs).leaves if isinstance(leaf, torch.Tensor)]
            else:
                inputs = [tensors[index] for index in order]
        else:
            specialisation, order = found
            if specialisation is not self._current:
                self.__dict__["_current"] = specialisation
                specialisation.used = next(self._clock)
            inputs = [tensors[index] for index in order]
        # Every rank has the same inputs, so all of them find a program, or all of them make one.
        if specialisation.program.interface.guard is not None and not specialisation.choose(inputs):
            self._respecialise(specialisation, args, kwargs, inputs)
        arguments = self._signature.bound(args, kwargs) if specialisation.program.interface.states else None
        result = specialisation(inputs, self._model, arguments)
        if self._watches.live:  # modules that run as they are may note something
            self._watches.go_on()
        return result

    def _respecialise(self, specialisation: Specialisation, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[torch.Tensor]) -> None:
        """Build the program for other values read from the inputs."""
        name, guard = type(self._model).__name__, specialisation.program.interface.guard
        read = guard.changed([tensor.contiguous() for tensor in inputs]) if guard is not None else None
        reason = f"{read.function} reads another value at {read.where}" if read is not None else "a value read from the inputs changed"
        if len(specialisation.programs) == MAX_ALTERNATIVES:
            log.warning("%s: more than %d programs for inputs of one signature, each compiled for other values: %s", name, MAX_ALTERNATIVES, reason)
        program = self._build(self._signature.check(args, kwargs), static=not specialisation.program.symbolic)
        log.info("%s: a program was compiled in %.1f s: %s", name, program.interface.seconds, reason)
        specialisation.use(program)
        self._evict()

    def _state_key(self, key: list[Any]) -> None:
        """What a program depends on besides its inputs."""
        parameters, name = self._probe
        parameter = parameters.get(name)
        device = "cpu" if parameter is None else parameter.device.type
        autocast = torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
        key += (
            self._model.training, autocast, None if parameter is None else (parameter.dtype, parameter.device),
            self._model.__dict__.get("_hf_peft_config_loaded"),
        )  # fmt: skip

    def _specialise(self, args: Sequence[Any], kwargs: Mapping[str, Any], fast_key: Key | None) -> Specialisation:
        """The specialisation for this call: known, from a symbolic program, or newly built; remembered under `fast_key`."""
        call = self._signature.check(args, kwargs)
        items: list[Any] = []
        self._state_key(items)
        read(dict(zip(call.paths, call.leaves, strict=True)), items, [])
        key = tuple(items)
        specialisation = self._programs.get(key)
        if specialisation is None:
            specialisation = Specialisation(self._find_or_build(call, key), key, summary(call))
            self._programs[key] = specialisation
            self._evict()
        specialisation.used = next(self._clock)
        self.__dict__["_current"] = specialisation
        if fast_key is not None:
            order = self._signature.tensor_order(args, kwargs)
            if order is not None:
                specialisation.orders[fast_key] = order
                self._fast[fast_key] = (specialisation, order)
        return specialisation

    def _find_or_build(self, call: Call, key: Key) -> Program:
        name = type(self._model).__name__
        tensors = [leaf for leaf in call.leaves if isinstance(leaf, torch.Tensor)]
        reasons = []
        known = list({id(program): (found, program) for found in self._programs.values() for program in found.programs}.values())
        for found, program in known:
            if not program.symbolic or fixed_part(found.key) != fixed_part(key):
                continue
            failed = program.interface.sizes.failed([tensor.shape for tensor in tensors])
            if failed is None and program.fits(tensors):
                self._builder.reuse(call)
                log.info("%s: the symbolic program is reused for %s", name, differences(found.summary, summary(call)))
                return program
            reasons.append(f"the symbolic program needs {failed or 'other values in the inputs'}")
        if not known:
            reason = "first call"
        elif reasons:
            reason = reasons[-1]
        else:
            reason = f"the program is fixed to its inputs and they changed: {differences(known[-1][0].summary, summary(call)) or 'the state of the model'}"
        static = bool(known) and not any(program.symbolic for _, program in known)
        program = self._build(call, static=static)
        kind = "symbolic" if program.symbolic else "fixed sizes"
        log.info("%s: a program (%s) was compiled in %.1f s: %s", name, kind, program.interface.seconds, reason)
        return program

    def _build(self, call: Call, static: bool) -> Program:
        program = self._builder.build(call, static=static)
        self._watches.renew(program.gm.graph)
        return program

    def _evict(self) -> None:
        while sum(len(found.programs) for found in self._programs.values()) > self._max_programs:
            oldest = min(self._programs.values(), key=lambda found: found.used or float("inf"))
            if oldest.others:
                oldest.others.pop()
                continue
            del self._programs[oldest.key]
            for fast_key in oldest.orders:
                self._fast.pop(fast_key, None)

    # ---- looking inside

    @property
    def graph_module(self) -> fx.GraphModule:
        """The emitted program of the latest call: an ordinary FX graph. After a pass of your own and `recompile()` on it, calls run the new code."""
        return self._current.program.gm

    def print_readable(self, print_output: bool = True) -> str:
        """The code of the latest program; every line says global -> local shape, layout, stage and source line. Returned, and printed unless told not to."""
        program = self._current.program
        text = readable(program.gm, getattr(program.plan, "inspector", None), program.rank)
        if print_output:
            print(text)
        return text

    @property
    def plan(self) -> Any:
        """The plan of the latest call."""
        return self._current.program.plan

    def explain(self) -> str:
        """What was sharded, what is communicated, and why, for the latest call."""
        return self.plan.explain()

    def save(self, path: Any) -> None:
        """Write all programs to a file; see `seqpar.save`."""
        from seqpar.saving import save

        save(self, path)

    def recompile(self) -> None:
        """Forget all programs; the next call makes a new one."""
        self._programs.clear()
        self._fast.clear()
        self._watches.clear()

    # ---- being the model

    def __getattr__(self, name: str) -> Any:
        if "_model" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        value = getattr(self.__dict__["_model"], name)
        if callable(value) and any(part in name for part in CHANGES_MODEL):
            self.recompile()
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or "_model" not in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self._model, name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "SequenceParallelModule":
        self._model._apply(fn, recurse)
        self.recompile()
        return self

    def to(self, *args: Any, **kwargs: Any) -> "SequenceParallelModule":
        """The model's own `.to`; the programs are made anew."""
        self._model.to(*args, **kwargs)
        self.recompile()
        return self

    def train(self, mode: bool = True) -> "SequenceParallelModule":
        """The model's own `.train`; training has programs of its own."""
        self._model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `state_dict`."""
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `load_state_dict`."""
        return self._model.load_state_dict(*args, **kwargs)

    def __copy__(self) -> "SequenceParallelModule":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceParallelModule":
        raise UnsupportedError("a compiled module has programs of this rank and cannot be copied: copy the model before compiling it, and compile the copy")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError("a compiled module has programs of this rank and cannot be pickled: send the model and compile it there, keep its `state_dict()`, or use `seqpar.save`")

    def extra_repr(self) -> str:
        """Which model this is."""
        return f"model={type(self._model).__name__}, programs={len(self._programs)}"


def model_forward(module: SequenceParallelModule, model: torch.nn.Module) -> Callable[..., Any]:
    """A `forward` that looks like the model's (pipelines inspect its parameters)."""
    run = module._run

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(args, kwargs)

    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return forward


def first_parameter(model: torch.nn.Module) -> tuple[dict[str, Any], str]:
    """(the dictionary that holds it, its name): a parameter whose dtype and device stand for the model's."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                return module._parameters, name
    return {}, ""
