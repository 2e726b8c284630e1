"""The programs of a compiled module as plain data and back; `saving.py` puts them into a file.

Before: SequenceParallelModule with two programs on four ranks
After:  {"calls.json": signatures, "program0.json": sizes, plan, guard, …, "program0/rank2.json": its nodes, …} and the constants as bytes
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from seqpar.compile import Compiler
from seqpar.errors import SavedProgramError
from seqpar.module import Loaded, SequenceParallelModule, Specialisation
from seqpar.passes.arguments import Call
from seqpar.passes.bind import axes_used, bind_groups
from seqpar.passes.from_dict import read_dataclass
from seqpar.passes.inspector import Kept
from seqpar.passes.plan import Plan
from seqpar.passes.read_guard import ReadGuard
from seqpar.passes.replay import Record
from seqpar.passes.save_graph import Constants, plain_name, read_constants, read_graph, write_graph
from seqpar.passes.save_sizes import read_sizes, write_sizes
from seqpar.passes.save_values import Codec, read_spec, read_tensor, write_spec, write_tensor
from seqpar.passes.state import Mutation
from seqpar.program import Interface, Program, Saved
from seqpar.runner import Runner
from seqpar.signature import Signature

Members = dict[str, Any]
Raw = dict[str, bytes]
Reader = Callable[[str], Any]
FORMS = (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError, RecursionError)


# ---- writing -------------------------------------------------------------------------------------


def write_module(compiled: SequenceParallelModule, codec: Codec, ranks: int, pictures: bool = True) -> tuple[Members, Raw]:
    """JSON members and raw members of all programs. pictures: with what `explain()` and `to_html()` need beside the plan.

    Raises:
        SavedProgramError: something in them cannot be written.
    """
    found = sorted(compiled._programs.values(), key=lambda specialisation: -specialisation.used)
    if not found:
        raise SavedProgramError("there is no program to save: call the compiled module once")
    programs = list({id(program): program for specialisation in found for program in specialisation.programs}.values())
    numbers = {id(program): i for i, program in enumerate(programs)}
    calls = {
        "example": write_call(compiled._signature.example, codec),
        "programs": len(programs),
        "signatures": [
            {"key": codec.write(list(s.key)), "summary": s.summary, "programs": [numbers[id(program)] for program in s.programs]} for s in found
        ],
    }
    members: Members = {"calls.json": calls}
    raw: Raw = {}
    for i, program in enumerate(programs):
        if program.saved is not None:
            raw.update(program.saved.members(f"program{i}"))
        else:
            write_program(f"program{i}", program, codec, ranks, members, raw, pictures)
    return members, raw


def write_call(call: Call, codec: Codec) -> dict[str, Any]:
    """The example of a signature; of its tensors shape and dtype."""
    leaves = []
    for path, leaf in zip(call.paths, call.leaves, strict=True):
        try:
            leaves.append({"tensor": [list(leaf.shape), codec.write(leaf.dtype)]} if isinstance(leaf, torch.Tensor) else {"plain": codec.write(leaf)})
        except SavedProgramError as error:
            raise SavedProgramError(f"{error} (the argument {path})") from None
    return {"leaves": leaves, "paths": list(call.paths), "spec": write_spec(call.spec, codec), "positional": call.positional}


def write_program(name: str, program: Program, codec: Codec, ranks: int, members: Members, raw: Raw, pictures: bool) -> None:
    """Add one program, under `name`, to the members of a file."""
    interface = program.interface
    if interface.states:
        names = ", ".join(write.argument for write in interface.states)
        raise SavedProgramError(f"the model assigns attributes of the objects in its argument {names}: such a program cannot be saved")
    constants = Constants(codec)
    for rank in range(ranks):
        members[f"{name}/rank{rank}.json"] = write_graph(program.plan.inspector.partitioned.program(rank), constants)
    members[f"{name}.json"] = {
        "sizes": write_sizes(interface.sizes),
        "symbolic": interface.symbolic,
        "out_spec": write_spec(interface.out_spec, codec),
        "mutations": [[mutation.output, mutation.buffer, mutation.placeholder] for mutation in interface.mutations],
        "guard": None if interface.guard is None else write_guard(interface.guard, constants, f"{name}/read", raw),
        "seconds": interface.seconds,
        "plan": program.plan.to_dict(),
        "title": type(program.gm).__name__,
        "constants": {"tensors": constants.tensors, "calls": constants.calls},
        "pictures": pictures,
    }
    if pictures:
        inspector = program.plan.inspector
        members[f"{name}/pictures.json"] = Kept(inspector.details, inspector.drawing).to_dict()
    raw.update({f"{name}/{key}.bin": data for key, data in constants.raw.items()})


def write_guard(guard: ReadGuard, constants: Constants, name: str, raw: Raw) -> dict[str, Any]:
    """The values the model reads from its inputs, and the program that computes them."""
    reads = []
    for i, read in enumerate(guard.reads):
        form, raw[f"{name}{i}.bin"] = write_tensor(read.value)
        reads.append({"value": form, "reduce": read.reduce, "function": read.function, "where": read.where})
    return {"graph": write_graph(guard.gm, constants), "reads": reads}


# ---- reading -------------------------------------------------------------------------------------


def read_module(file: bytes, json: Reader, raw: Callable[[str], bytes], model: torch.nn.Module, builder: Compiler, codec: Codec) -> Loaded:
    """The programs of this rank. file: the whole of it, which the programs keep to be saved again.

    Raises:
        SavedProgramError: the data does not describe programs of this model.
    """
    try:
        calls = json("calls.json")
        programs = [replace(read_program(f"program{i}", json, raw, model, builder, codec), saved=Saved(file, f"program{i}")) for i in range(calls["programs"])]
        call = read_call(calls["example"], inspect.signature(model.forward), codec)
        found = []
        for i, entry in enumerate(calls["signatures"]):
            first, *others = (programs[number] for number in entry["programs"])
            found.append(Specialisation(first, tuple(codec.read(entry["key"])), dict(entry["summary"]), used=-i, others=others))
        return Loaded(Signature.of(call), found)
    except FORMS as error:
        raise SavedProgramError(f"the file is damaged: {type(error).__name__}: {error}") from error


def read_call(data: Mapping[str, Any], signature: inspect.Signature, codec: Codec) -> Call:
    leaves = []
    for leaf in data["leaves"]:
        ((kind, value),) = leaf.items()
        leaves.append(torch.empty(value[0], dtype=codec.read(value[1]), device="meta") if kind == "tensor" else codec.read(value))
    return Call(signature, tuple(leaves), tuple(map(str, data["paths"])), read_spec(data["spec"], codec), int(data["positional"]))


def read_program(name: str, json: Reader, raw: Callable[[str], bytes], model: torch.nn.Module, builder: Compiler, codec: Codec) -> Program:
    data = json(f"{name}.json")
    constants = read_constants(data["constants"], lambda key: raw(f"{name}/{key}.bin"), codec)
    rank = 0 if builder.mesh is None else builder.mesh.rank
    unbound = read_graph(json(f"{name}/rank{rank}.json"), model, constants, codec.device, plain_name(data["title"]))
    sizes, out_spec = read_sizes(data["sizes"]), read_spec(data["out_spec"], codec)
    mutations = tuple(Mutation(output, buffer, placeholder) for output, buffer, placeholder in data["mutations"])
    check_outputs(unbound, sizes.names, out_spec.num_leaves, mutations, model)
    guard = None
    if data["guard"] is not None:
        gm = read_graph(data["guard"]["graph"], model, constants, codec.device, "SequenceParallelGuard")
        reads = [(read, read_tensor(read["value"], raw(f"{name}/read{i}.bin"), codec)) for i, read in enumerate(data["guard"]["reads"])]
        guard = ReadGuard(gm, tuple(Record(value, read["reduce"], None, read["function"], read["where"]) for read, value in reads))
    interface = Interface(sizes, bool(data["symbolic"]), out_spec, mutations, (), guard, float(data["seconds"]))
    split = bool(axes_used(unbound))
    gm = bind_groups(unbound, builder.mesh)
    opaque = bool(data["constants"]["calls"])
    run = Runner(gm, builder.compiled(not opaque, interface.symbolic))
    kept = read_dataclass(Kept, json(f"{name}/pictures.json")) if data["pictures"] else None
    plan = replace(Plan.from_dict(data["plan"]), kept=kept)
    return Program(interface, gm, run, plan, split, rank)


def check_outputs(gm: torch.fx.GraphModule, names: tuple[str, ...], results: int, mutations: tuple[Mutation, ...], model: torch.nn.Module) -> None:
    """Raise SavedProgramError unless inputs and outputs are as the rest of the file says."""
    placeholders = tuple(node.name for node in gm.graph.nodes if node.op == "placeholder")
    outputs = gm.graph.output_node().args[0]
    known = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    fit = isinstance(outputs, list | tuple) and len(outputs) == results + len(mutations) and placeholders == names
    for mutation in mutations:
        right_place = mutation.buffer in known if mutation.buffer is not None else mutation.placeholder in range(len(names))
        fit = fit and right_place and mutation.output in range(results, results + len(mutations))
    if not fit:
        raise SavedProgramError("the file holds a program whose inputs or outputs are not those of this model")
