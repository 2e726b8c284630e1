"""An emitted program as JSON and back, without code: nodes, and the names of what they call and read.

Before: %linear = aten.linear.default(%x_r, %blocks_0_weight)
After:  {"name": "linear", "op": "call_function", "target": "aten.linear.default", "args": {"tuple": [{"node": 0}, {"node": 1}]}, …}

Names in a file become names in the Python code that FX makes of a graph, so each is checked to be a plain name, and what it reads to
be part of the model or a constant of the file.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from seqpar.errors import SavedProgramError
from seqpar.passes.labelled import Content
from seqpar.passes.localise import source_line
from seqpar.passes.save_opaque import read_call, write_call
from seqpar.passes.save_targets import read_target, write_target
from seqpar.passes.save_values import Codec, read_tensor, write_tensor
from seqpar.passes.share import share_graph
from seqpar.passes.weight_parts import made_of_parts, parts_of
from seqpar.runtime.opaque import OpaqueCall, run_opaque

OPS = ("placeholder", "get_attr", "call_function", "output")


@dataclass
class Constants:
    """Constants while a file is written: name -> description and content, or a value that JSON holds."""

    codec: Codec
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)
    calls: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        """Note a constant that a graph reads."""
        if isinstance(value, torch.Tensor):
            self.tensors[name], self.raw[name] = write_tensor(value)
        elif isinstance(value, OpaqueCall):
            self.calls[name] = write_call(value, self.codec)
        else:
            raise SavedProgramError(f"a program with a {type(value).__name__} in it ({name}: the graph of a higher order operator) cannot be saved")


def write_graph(gm: fx.GraphModule, constants: Constants) -> list[dict[str, Any]]:
    """The nodes of a program, groups still named by axis. What they read of the program's own is added to `constants`.

    Raises:
        SavedProgramError: names the node that cannot be written, and its source line.
    """
    numbers = {node: i for i, node in enumerate(gm.graph.nodes)}
    codec = Codec(constants.codec.device, node=numbers.__getitem__)
    extra = gm.__dict__.get("_seqpar_extra", {})
    written = []
    for node in gm.graph.nodes:
        try:
            target = write_target(node.target) if node.op == "call_function" else str(node.target)
            if node.op not in OPS:
                raise SavedProgramError(f"a program with a {node.op} node cannot be saved")
            if node.op == "get_attr" and isinstance(extra.get(str(node.target).partition(".")[0]), Content):
                raise SavedProgramError("a program of a model whose weights are of a class that does not say what they are made of (GGUF, bitsandbytes) cannot be saved")
            if node.op == "get_attr" and node.target in extra and node.target not in constants.tensors | constants.calls:
                constants.add(node.target, extra[node.target])
            arguments = {"args": codec.write(tuple(node.args)), "kwargs": codec.write(dict(node.kwargs))}
        except SavedProgramError as error:
            raise SavedProgramError(f"{error} ({node.name}, {source_line(node).strip() or 'no source line'})") from None
        written.append({"name": node.name, "op": node.op, "target": target, **arguments, **whence(node)})
    return written


def whence(node: fx.Node) -> dict[str, str]:
    """Source line and module path, for people."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    found = {"where": " ".join(source_line(node).split()), "module": stack[-1][0] if stack else ""}
    return {key: value for key, value in found.items() if value}


def read_constants(data: Mapping[str, Any], raw: Callable[[str], bytes], codec: Codec) -> dict[str, Any]:
    """Name -> constant. data: {"tensors": …, "calls": …}."""
    found: dict[str, Any] = {}
    for name, form in data["tensors"].items():
        found[plain_name(name)] = read_tensor(form, raw(name), codec)
    for name, call in data["calls"].items():
        found[plain_name(name)] = read_call(call, codec)
    return found


def read_graph(data: Sequence[Mapping[str, Any]], model: torch.nn.Module, constants: Mapping[str, Any], device: torch.device, name: str) -> fx.GraphModule:
    """The program over the model's own parameters; the inverse of `write_graph`.

    Raises:
        SavedProgramError: a node calls or reads what a program must not.
    """
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def find(number: int) -> fx.Node:
        if number not in range(len(nodes)):
            raise ValueError("it comes later or does not exist")
        return nodes[number]

    codec = Codec(device, find=find)
    parts = {path for kept in made_of_parts(model) for path, _ in parts_of(kept.weight, kept.path)}
    for line in data:
        op, args, kwargs = line["op"], codec.read(line["args"]), codec.read(line["kwargs"])
        if op not in OPS or not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(map(is_plain_name, kwargs)):
            raise SavedProgramError(f"the file holds {line!r:.200}, which is no node of a program")
        if op == "call_function":
            target = read_target(line["target"])
        elif op == "get_attr":
            target = attribute(line["target"], model, constants.keys() | parts)
        else:
            target = plain_name(line["target"])
        node = graph.create_node(op, target, args, kwargs, name=plain_name(line["name"]))
        describe(node, line)
        nodes.append(node)
    if not nodes or nodes[-1].op != "output" or any(node.op == "output" for node in nodes[:-1]):
        raise SavedProgramError("the file holds a program without its outputs")
    check_modules(graph, model, constants)
    graph.lint()
    return share_graph(model, graph, dict(constants), name)


def describe(node: fx.Node, line: Mapping[str, Any]) -> None:
    """Give a node its source line and module, as far as they are harmless text."""
    where, module = (" ".join(str(line.get(key, "")).split()) for key in ("where", "module"))
    if where:
        node.meta["stack_trace"] = where
    if module:
        node.meta["nn_module_stack"] = {module: (module, "")}


def is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def plain_name(name: Any) -> str:
    if not is_plain_name(name):
        raise SavedProgramError(f"the file holds the name {name!r:.80}, which is no name of a value")
    return str(name)


def attribute(name: Any, model: torch.nn.Module, others: Set[str]) -> str:
    """`name` if it is a parameter, buffer or module of the model, or one of the others: a constant of the file, a tensor in a quantised weight."""
    if not isinstance(name, str) or not all(part.isidentifier() or part.isdigit() for part in name.split(".")):
        raise SavedProgramError(f"the file reads {name!r:.80}, which is no name of a parameter")
    owner, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        module = None
    if name in others or (module is not None and any(last in held for held in (module._parameters, module._buffers, module._modules))):
        return name
    raise SavedProgramError(f"the file reads {name}, which is no parameter, buffer or module of this model")


def check_modules(graph: fx.Graph, model: torch.nn.Module, constants: Mapping[str, Any]) -> None:
    """A module is only run by `run_opaque`, and the one its call was recorded for."""
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for node in graph.nodes:
        read = [n.target for n in node.all_input_nodes if n.op == "get_attr"]
        calls = [constants[name].name for name in read if isinstance(constants.get(name), OpaqueCall)]
        modules = [name for name in read if name not in constants and name in names]
        if calls != modules or (node.target is run_opaque) != bool(calls) or len(calls) > 1:
            raise SavedProgramError(f"the file runs {modules or 'a module'} in a way a program must not ({node.name})")
