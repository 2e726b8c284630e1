"""Why a model has no declared plan: the first operator at which a layout would have to change, and what to extract so that it can."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from seqpar.partitioner.declare import Declared, Violation
from seqpar.partitioner.marker import is_marker, pin_of
from seqpar.partitioner.op import shape_of
from seqpar.passes.boundary import Boundary
from seqpar.passes.derive import Problem

FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n?\s*(.*)')


@dataclass(frozen=True)
class Frame:
    """A line of the user's source."""

    file: str
    line: int
    function: str
    text: str


def frames(node: Node) -> list[Frame]:
    """Where a node was called from, outermost first."""
    return [Frame(file, int(line), function, text.strip()) for file, line, function, text in FRAME.findall(node.meta.get("stack_trace") or "")]


def reason(problem: Problem, answer: Declared) -> str:
    """One paragraph about the first change that no plan can express."""
    if not problem.needed:
        return "the compiler exchanges no attention over these ranks, so there is nothing to declare"
    order = {node: i for i, node in enumerate(problem.graph.nodes)}
    if not answer.violations:
        return "no labels satisfy all conditions at once"
    first = min(answer.violations, key=lambda v: (order[v.reader], order[v.operand]))
    if first.reader in problem.inference.relations and problem.inference.relations[first.reader].attention is not None:
        return _attention_reason(problem, first)
    return _inline_reason(first)


def _attention_reason(problem: Problem, found: Violation) -> str:
    node, relation = found.reader, problem.inference.relations[found.reader]
    spec, where = relation.attention, _where(found.reader)
    rows = [problem.inference.table.axis_length(relation.operand_axes[i][-2]) for i in (spec.q, spec.k)]
    what = f"attention of {rows[0]} queries and {rows[1]} keys at {where}"
    if node not in problem.mesh:
        return f"{what} does not exchange over the ranks: its keys must be whole, but they come in parts. Call the runtime's attention there (with its parallel configuration)"
    ranks = problem.degrees.ranks
    sharded = [problem.inference.table.sizes.hint(problem.inference.table.length(a)) for f in problem.inference.table.expand_axis(relation.operand_axes[spec.q][-2]) for a in f]
    odd = [n for n in sharded if n % ranks]
    if problem.rules.even and odd:
        return f"{what}: {odd[0]} positions are not divided by {ranks} ranks. Pad the example inputs, or take another number of ranks"
    operand = relation.operands.index(found.operand) if found.operand in relation.operands else spec.q
    if operand == spec.mask:
        return f"{what}: its mask of shape {shape_of(found.operand.meta['val'])} does not fit keys in parts. Give a mask of one row per batch, or none"
    part = "queries" if operand == spec.q else "keys and values"
    return f"{what}: {part} would have to be {'split' if found.change == 'split' else 'whole'} there, and {_source_of(found.operand)}"


def _inline_reason(found: Violation) -> str:
    reader, operand = found.reader, found.operand
    verb = "split" if found.change == "split" else "gathered"
    shape = tuple(int(n) if isinstance(n, int) else str(n) for n in shape_of(operand.meta["val"])) if hasattr(operand.meta.get("val"), "shape") else "?"
    if reader.op == "output":
        return f"{_name(operand)} ({_where(operand)}) is returned in parts: no module's output behind the last attention can be gathered. {_advice(operand, operand)}"
    if is_marker(reader):
        return marker_reason(Boundary.from_key(pin_of(reader).key), reader, verb)
    return (
        f"inline {_name(reader)} at {_where(reader)}: what it reads ({_name(operand)} of shape {shape}, {_where(operand)}) would have to be {verb} there, "
        f"between two modules. {_advice(operand, reader)}"
    )


def marker_reason(place: Boundary, marker: Node, verb: str) -> str:
    """Why a tensor at the border of a module cannot be split or gathered there, and what to do."""
    where = f" ({_where(marker)})" if frames(marker) else f" ({place.source})" if place.source else ""
    if verb == "gathered" and place.kind == "input":
        return f"{place}{where} would have to be gathered, and a plan gathers outputs. Pass it through a submodule of its own before (an nn.Identity will do), whose output can be gathered"
    return (
        f"{place}{where} would have to be {verb}, and a plan cannot do that there: it names modules that return a tensor or a flat tuple of tensors, and one dim of a tensor that is cut "
        "in one way. Return a flat tuple, or pass the tensor through a submodule of its own (an nn.Identity will do)"
    )


def _name(node: Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return f"{'input' if node.op == 'placeholder' else 'parameter'} {node.target}"
    return str(Boundary.from_key(pin_of(node).key)) if is_marker(node) else str(node.target).removeprefix("aten.").split(".")[0]


def _where(node: Node) -> str:
    known = frames(node)
    return f"{known[-1].file}:{known[-1].line}" if known else "an input of the model" if node.op == "placeholder" else "an unknown line"


def _source_of(operand: Node) -> str:
    return f"they are computed inline at {_where(operand)}. {_advice(operand, operand)}"


def _advice(operand: Node, reader: Node) -> str:
    lines = _lines(operand, reader)
    if lines is None:
        return "Extract that step into a submodule, so that a plan can name its output"
    file, function, first, last = lines
    which = f"line {first}" if first == last else f"lines {first} to {last}"
    return f"Extract {which} of {function} ({file}) into a submodule, so that a plan can name its inputs and outputs"


def _lines(operand: Node, reader: Node) -> tuple[str, str, int, int] | None:
    """The lines of one function that compute `reader` from the last modules called before it."""
    known = frames(reader) or frames(operand)
    if not known:
        return None
    last = known[-1]
    numbers = {last.line}
    for node in (operand, *_inline_before(operand)):
        own = frames(node)
        if own and (own[-1].file, own[-1].function) == (last.file, last.function) and len(own) == len(known):
            numbers.add(own[-1].line)
    return last.file, last.function, min(numbers), max(numbers)


def _inline_before(node: Node, limit: int = 20) -> Iterator[Node]:
    """What a value was computed from, back to the nearest boundaries of modules."""
    waiting, seen = [node], {node}
    while waiting and len(seen) < limit:
        current = waiting.pop()
        for operand in current.all_input_nodes:
            if operand not in seen and not is_marker(operand):
                seen.add(operand)
                waiting.append(operand)
                yield operand
