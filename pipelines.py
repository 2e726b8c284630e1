"""`seqpar.parallelize`: a diffusers pipeline, unmodified, whose denoisers run sequence-parallel."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from seqpar.compat import pytree
from seqpar.compile import sp_compile
from seqpar.denoiser import Denoiser, attribute_set, forward_replaced
from seqpar.denoising_loops import Loops, draws_bars
from seqpar.errors import UnsupportedError
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.machines import rates_of
from seqpar.runtime.mesh import build_mesh, check_degrees
from seqpar.runtime.same_inputs import SameInputs, first_ranks_random_numbers
from seqpar.runtime.travel import check_comm_dtype

HANDLE = "_seqpar_handle"
NEEDED = ("__call__", "components")  # what is used of a pipeline besides its progress bars


def parallelize(
    pipe: Any, *, ulysses: int = 1, ring: int = 1, mesh: Any = None, dynamic: bool | None = None, backend: str | None = None,
    comm_dtype: torch.dtype | None = None, hardware: str | Machine | None = None,
) -> ParallelPipeline:
    """Make `pipe(...)` run its denoisers on `ulysses` x `ring` processes. Every rank calls it, and later calls `pipe` with the same arguments.

        seqpar.parallelize(pipe, ulysses=2, ring=2)
        image = pipe("a lighthouse").images[0]  # on every rank
        pipe.unparallelize()

    A denoiser is a component (transformer, UNet, ControlNet, …) that the pipeline calls inside its denoising loop and that has something to shard. It is compiled
    at its first call, once per signature. Its inputs (latents, prompt embeddings, …) and the pipeline's random numbers are the first rank's;
    everything else runs on every rank as before, and outside `pipe(...)` every component is untouched. A pipeline that is made of others (a prior and a
    decoder, …) is parallelised with all of them.

    Args:
        pipe: a diffusers pipeline, modular or not, on its device. The object stays the same; its class becomes a subclass of the same name, and so do those of pipelines it holds.
        ulysses: number of ranks that exchange attention heads.
        ring: number of ranks keys and values travel around.
        mesh: as in `sp_compile`, and so are all that follow.
        dynamic: symbolic lengths, or a program per input shape.
        backend: a Dynamo backend, for example "inductor".
        comm_dtype: what attention's exchanges are rounded to.
        hardware: whose rates decide how each attention communicates.

    Returns:
        The handle: `.denoisers`, `.plans`, `.explain()`, `.unparallelize()`; a context manager that undoes at the end.

    Raises:
        UnsupportedError: `pipe` is no diffusers pipeline, or it, or one it holds, is parallelised already.
        MeshError: degrees, world size, mesh do not fit, there is no process group, or no such hardware.
    """
    missing = _missing(pipe)
    if missing:
        raise UnsupportedError(f"{type(pipe).__name__} is not a diffusers pipeline (it has no {', '.join(missing)}); for a model use seqpar.sp_compile")
    for path, part in _pipelines(pipe).items():
        if getattr(part, HANDLE, None) is not None:
            raise UnsupportedError(f"this {type(part).__name__}{f' ({path})' if path else ''} is parallelised already: call its unparallelize() first")
    check_degrees(ulysses=ulysses, ring=ring)
    check_comm_dtype(comm_dtype)
    rates_of(hardware)  # a name that does not exist is an error here, not at the first call
    settings = {"dynamic": dynamic, "backend": backend, "comm_dtype": comm_dtype, "hardware": hardware}
    return ParallelPipeline(pipe, build_mesh(ulysses, ring, mesh=mesh), **settings)


def unparallelize(pipe: Any) -> None:
    """Undo `parallelize`.

    Raises:
        UnsupportedError: `pipe` is not parallelised.
    """
    handle = getattr(pipe, HANDLE, None)
    if handle is None:
        raise UnsupportedError(f"this {type(pipe).__name__} is not parallelised")
    handle.unparallelize()


class ParallelPipeline:
    """What `parallelize` did to a pipeline, and the way back; as a context manager it undoes at the end of the block.

    Attributes:
        pipe: the pipeline.
        denoisers: by component name, those met in the calls so far.
    """

    def __init__(self, pipe: Any, mesh: Any, **settings: Any) -> None:
        self.pipe = pipe
        self.denoisers: dict[str, Denoiser] = {}
        self._mesh = mesh
        self._compile = functools.partial(sp_compile, ulysses=mesh.ulysses, ring=mesh.ring, mesh=mesh.device_mesh, **settings)
        self._loops = Loops()
        self._same: SameInputs | None = None
        self._kinds = [(part, type(part)) for part in _pipelines(pipe).values()]
        for part, kind in self._kinds:
            part.__class__ = _subclass(kind, self)

    def unparallelize(self) -> None:
        """The pipeline, and those it holds, are as they were; compiled programs are dropped. Doing it twice is harmless."""
        for part, kind in self._kinds:
            if getattr(part, HANDLE, None) is self:
                part.__class__ = kind
        self.denoisers.clear()

    def __enter__(self) -> ParallelPipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unparallelize()

    @property
    def plans(self) -> list[Any]:
        """The plan of every compiled program's latest call."""
        return [program.plan for denoiser in self.denoisers.values() for program in denoiser.programs]

    @property
    def pages(self) -> list[str]:
        """What `explain()` prints, one page per compiled program."""
        programs = ((name, denoiser.model, program) for name, denoiser in self.denoisers.items() for program in denoiser.programs)
        return [f"{name} ({type(model).__name__})\n{program.explain()}" for name, model, program in programs]

    def explain(self) -> str:
        """What was sharded, what is communicated, and why, of every compiled program."""
        return "\n\n".join(self.pages) or "nothing is compiled yet: call the pipeline first"

    # ---- one call of the pipeline

    @contextlib.contextmanager
    def calling(self, arguments: Any) -> Iterator[None]:
        """For the time of one call: random numbers agree, and components that are called in the loop run sequence-parallel."""
        if self._same is not None:  # a pipeline that calls itself, or one that it holds
            yield
            return
        generators = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Generator)]
        unique = list({id(generator): generator for generator in generators}.values())
        self._same, self._loops = SameInputs(self._mesh), Loops()
        used: set[str] = set()
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(first_ranks_random_numbers(unique, self._mesh))
                stack.enter_context(self._loops.watched(_pipelines(self.pipe).values()))
                for name, module in _modules(self.pipe).items():
                    stack.enter_context(forward_replaced(module, functools.partial(self._make_forward, name, module, used)))
                yield
        finally:
            self._same = None
        if not used:
            warnings.warn(
                f"{type(self.pipe).__name__} called none of its components in a denoising loop, so nothing ran in parallel; if it makes pipelines of other models "
                "while it runs, parallelize those",
                stacklevel=3,
            )

    def _make_forward(self, name: str, module: torch.nn.Module, used: set[str], plain: Callable[..., Any]) -> Callable[..., Any]:
        # A call that torch.compile has replaced traces what it finds here.
        shield: Any = torch.compiler.disable if module._compiled_call_impl is not None else lambda function: function

        @shield
        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._loops.running:
                return plain(*args, **kwargs)
            used.add(name)
            refuse_compiled(name, module)
            # As it was for the tracer, and for a model that calls itself.
            with attribute_set(module, "forward", plain):
                return self._denoise(name, module, args, kwargs)

        return forward

    def _denoise(self, name: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        denoiser = self.denoisers.get(name)
        if denoiser is None or denoiser.model is not module:
            denoiser = self.denoisers[name] = Denoiser(module, self._compile)
        inputs = denoiser.bind(args, kwargs)
        assert self._same is not None, "within a call"
        if self._mesh.size > 1:
            inputs = same_tensors(inputs, self._same, type(module).__name__)
        output = denoiser.run(inputs)
        self._same.known([leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)])
        return output


def refuse_compiled(name: str, module: torch.nn.Module) -> None:
    """A denoiser is compiled here, from the model's own code."""
    if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
        raise UnsupportedError(
            f'{name} was given to torch.compile: leave it as it is and pass backend="inductor" to parallelize, which compiles the parallel program'
        )


def same_tensors(inputs: dict[str, Any], same: SameInputs, title: str) -> dict[str, Any]:
    """The inputs with the first rank's tensors; everything else must agree."""
    leaves, spec = pytree.tree_flatten_with_path(inputs)
    named = {"".join(map(str, path)): leaf for path, leaf in leaves}
    tensors = {name: leaf for name, leaf in named.items() if isinstance(leaf, torch.Tensor)}
    text = "\n".join([title, *(_describe(name, leaf) for name, leaf in named.items())])
    received = same(tensors, text)
    return pytree.tree_unflatten([received.get(name, leaf) for name, leaf in named.items()], spec)


def _describe(name: str, leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{name}: {tuple(leaf.shape)} {leaf.dtype}"
    return f"{name}: {leaf!r}" if isinstance(leaf, bool | int | float | str | None) else f"{name}: a {type(leaf).__name__}"


def _missing(pipe: Any) -> list[str]:
    return [name for name in NEEDED if not hasattr(pipe, name)] or ([] if draws_bars(pipe) else ["progress_bar"])


def _pipelines(pipe: Any) -> dict[str, Any]:
    """The pipeline (at "") and all that it holds as attributes, at any depth, each once, by path: `{"": …, "prior_pipe": …}`."""
    found = {"": pipe}
    waiting = [""]
    while waiting:
        path = waiting.pop(0)
        for name, part in getattr(found[path], "__dict__", {}).items():
            if isinstance(part, torch.nn.Module | type) or _missing(part) or any(part is known for known in found.values()):
                continue
            where = f"{path}.{name}" if path else name
            found[where] = part
            waiting.append(where)
    return found


def _modules(pipe: Any) -> dict[str, torch.nn.Module]:
    """Components that are models, of the pipeline and those it holds, each once; the pipeline's own name for it counts."""
    parts = {(f"{path}.{name}" if path else name): part for path, each in _pipelines(pipe).items() for name, part in each.components.items()}
    found = {id(part): (name, part) for name, part in reversed(parts.items()) if isinstance(part, torch.nn.Module)}
    return dict(reversed(found.values()))


def _subclass(kind: type, handle: ParallelPipeline) -> type:
    """`kind` with calls that tell `handle`; python looks for `__call__` on the class only."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with handle.calling((args, kwargs)):
            return kind.__call__(self, *args, **kwargs)

    def undo(self: Any) -> None:
        """Undo `seqpar.parallelize`."""
        handle.unparallelize()

    methods = {"__call__": call, "unparallelize": undo, HANDLE: handle}
    # The name is written into saved pipelines and looked up in tables.
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__})
