"""Prove the operator rules: every sharding a rule claims gives what the whole operator gives.

    python -m seqpar.tools.check_rules              all operators with a rule
    python -m seqpar.tools.check_rules view cat     some of them
    python -m seqpar.tools.check_rules --json       for programs

For each sample call a graph of that one call is read by the axis inference, the atoms of one dim are declared sequences, the labels
are solved with free communication (so that everything that can be sharded is), and the programs of 2, 3 and 4 ranks are emitted,
run together in this process and compared with the call itself. Shardings that would be right but are not claimed are reported too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from seqpar.compat import pytree
from seqpar.errors import SeqparError
from seqpar.partitioner.cost import Prices
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.infer import Inference, infer
from seqpar.partitioner.label_problem import LabelProblem
from seqpar.partitioner.labels import REDUCED, Labels
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.lengths import Sizes, part
from seqpar.partitioner.op import outputs_of
from seqpar.partitioner.registry import registry
from seqpar.partitioner.solve import Solution
from seqpar.passes.emit import Emitter
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.tools.rule_hand_samples import hand_samples
from seqpar.tools.rule_samples import Sample, chosen, from_op_db
from seqpar.verification import SimulatedInterpreter, difference, same_bits

aten = torch.ops.aten
RANKS = (2, 3, 4)
FREE = Prices(byte=0.0, call=0.0, keys=0.0, encoded=0.0)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.complex64: 1e-6, torch.complex128: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MOVING = ("view", "parts", "index", "create")  # rule files whose operators must be exact
REORDERED = 20  # a sum taken in parts may differ by so many times more, where its terms cancel
UNDEFINED = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)  # only their shapes can be compared


@dataclass(frozen=True)
class Claim:
    """Atoms of one dim that are sharded together: of an output dim, or of a reduced operand dim (`dim` is -1)."""

    dim: int
    atoms: frozenset[int]


@dataclass
class Verdict:
    """What was found out about one operator. `claims`: (sample, sharding, number of ranks) triples that were run."""

    operator: str
    rule: str
    samples: int = 0
    claims: int = 0
    wrong: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


class Program(torch.nn.Module):
    """A graph to interpret; an `fx.GraphModule` would generate Python code that nobody runs."""

    def __init__(self, graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.graph = graph
        self.__dict__.update(constants)


def graph_of(sample: Sample) -> tuple[fx.Graph, fx.Node, list[Tensor]]:
    """placeholders -> alias -> the call -> output. The aliases can be sharded, which placeholders cannot."""
    graph = fx.Graph()
    tensors = sample.tensors()
    nodes: dict[int, fx.Node] = {}
    for tensor in tensors:
        placeholder = graph.placeholder(f"x{len(nodes)}")
        placeholder.meta["val"] = tensor
        nodes[id(tensor)] = graph.call_function(aten.alias.default, (placeholder,))
        nodes[id(tensor)].meta["val"] = tensor
    args, kwargs = pytree.tree_map(lambda leaf: nodes[id(leaf)] if isinstance(leaf, Tensor) else leaf, (sample.args, sample.kwargs))
    call = graph.call_function(sample.target, args, kwargs)
    result = sample.run()
    if isinstance(result, Tensor):
        call.meta["val"] = result
        graph.output((call,))
        return graph, call, tensors
    call.meta["val"] = tuple(result)
    items = []
    for i, value in enumerate(result):
        items.append(graph.call_function(operator.getitem, (call, i)))
        items[-1].meta["val"] = value
    graph.output(tuple(items))
    return graph, call, tensors


def candidates(inference: Inference, node: fx.Node) -> list[Claim]:
    """Atoms alone and factors as a whole, of every output dim and every reduced dim."""
    relation = inference.relations[node]
    found: dict[Claim, None] = {}
    places = [(dim, axis) for axes in relation.out_axes for dim, axis in enumerate(axes)]
    places += [(REDUCED, relation.operand_axes[i][dim]) for i, dim in relation.reduces]
    for dim, axis in places:
        for factor in inference.table.expand_axis(axis):
            found[Claim(dim, frozenset(factor))] = None
            found.update((Claim(dim, frozenset((a,))), None) for a in factor)
    return list(found)


def labels_for(inference: Inference, node: fx.Node, claim: Claim, ranks: int) -> Labels | None:
    """Everything sharded that the solver may shard, with the claim's atoms as the sequences; None if that leaves the node whole."""
    inference.sequences = dict.fromkeys(claim.atoms, 1)
    problem = LabelProblem(inference, Degrees(ranks, 1), FREE, set())
    problem.divisible = frozenset(inference.axes)  # constants too
    if claim.dim != REDUCED:
        problem._candidates[node] = claim.dim
    labels = problem.solve()
    touched = any(n is node and (dim == claim.dim) and a in claim.atoms for n, dim, a in labels.sharded)
    return labels if touched else None


def claims(inference: Inference, node: fx.Node, ranks: Iterable[int] = RANKS) -> Iterator[tuple[Claim, int, Labels]]:
    """The shardings that the rule of `node` makes possible, with their number of ranks."""
    for claim, count in itertools.product(candidates(inference, node), ranks):
        labels = labels_for(inference, node, claim, count)
        if labels is not None:
            yield claim, count, labels


def run_ranks(graph: fx.Graph, inference: Inference, labels: Labels, ranks: int, inputs: Sequence[Tensor], constants: Mapping[str, Tensor] | None = None) -> list[Any]:
    """Emit and run the programs of all ranks; outputs by rank. `constants`: what the graph gets by attribute."""
    solution = Solution(labels, Degrees(ranks, 1), FREE)
    programs = []
    for rank in range(ranks):
        emitted = Emitter(graph, LayoutView(inference, solution, rank), {}).run()
        programs.append(Program(emitted, constants or {}))
    run = [lambda groups, r=r: SimulatedInterpreter(programs[r], groups, r, None).run(*inputs) for r in range(ranks)]
    return SimulatedWorld(ranks, 1).run(run)


def fault(sample: Sample, expected: Sequence[Tensor], outputs: Sequence[Sequence[Tensor]], exact: bool, slack: int = 1) -> str | None:
    """How the ranks' outputs differ from the expected ones, or None."""
    for i, want in enumerate(expected):
        for rank, got in enumerate(outputs):
            if got[i].shape != want.shape or got[i].dtype != want.dtype:
                return f"rank {rank} returns {got[i].dtype}{list(got[i].shape)} for {want.dtype}{list(want.shape)}"
            if sample.target in UNDEFINED:
                continue
            _, relative = difference(got[i], want)
            if not relative <= (0.0 if exact else slack * TOLERANCE.get(want.dtype, 0.0)):
                return f"rank {rank} differs by {relative:.1e} in output {i}"
            if not same_bits(got[i], outputs[0][i]):
                return f"rank {rank} has other bits than rank 0 in output {i}"
    return None


def check_sample(sample: Sample, verdict: Verdict, ranks: Iterable[int] = RANKS) -> None:
    """Run every claim made about one call, and look for claims that were not made."""
    graph, node, inputs = graph_of(sample)
    try:
        inference = infer(graph, Sizes(), strides=True)
    except Exception as error:
        verdict.wrong.append(f"{sample}: the rule fails: {type(error).__name__}: {error}")
        return
    expected = outputs_of(node)
    exact = verdict.rule.partition(".")[0] in MOVING
    claimed: set[int] = set()
    verdict.samples += 1
    for claim, count, labels in claims(inference, node, ranks):
        claimed.add(claim.dim)
        verdict.claims += 1
        try:
            problem = fault(sample, expected, run_ranks(graph, inference, labels, count, inputs), exact, REORDERED if claim.dim == REDUCED else 1)
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if problem:
            where = "reduction" if claim.dim == REDUCED else f"output dim {claim.dim}"
            verdict.wrong.append(f"{sample}: {where} on {count} ranks: {problem}")
    if sample.target not in UNDEFINED:
        verdict.missed += [f"{sample}: output dim {d} follows {how}" for d, how in unclaimed(sample, expected, claimed)]


def unclaimed(sample: Sample, expected: Sequence[Tensor], claimed: set[int]) -> Iterator[tuple[int, str]]:
    """Output dims that the call itself would produce in parts from operands cut in parts."""
    tensors = sample.tensors()
    for dim in range(expected[0].dim()):
        length = expected[0].shape[dim]
        if dim in claimed or length < 4 or any(e.dim() <= dim or e.shape[dim] != length for e in expected):
            continue
        options = [[None, *(d for d in range(t.dim()) if t.shape[d] == length)] for t in tensors]
        for cut in itertools.islice(itertools.product(*options), 1, 16):
            if all(_naive(sample, tensors, cut, expected, dim, rank) for rank in range(2)):
                yield dim, " ".join(f"operand {i} dim {d}" for i, d in enumerate(cut) if d is not None)
                break


def _naive(sample: Sample, tensors: list[Tensor], cut: Sequence[int | None], expected: Sequence[Tensor], dim: int, rank: int) -> bool:
    """Does the call on parts of its operands give the part of its outputs?"""

    def narrow(x: Tensor, d: int) -> Tensor:
        sizes = [int(part(x.shape[d], r, 2)) for r in range(2)]
        return x.narrow(d, sum(sizes[:rank]), sizes[rank])

    local = {id(t): t if d is None else narrow(t, d) for t, d in zip(tensors, cut, strict=True)}
    args, kwargs = pytree.tree_map(lambda leaf: local[id(leaf)] if isinstance(leaf, Tensor) else leaf, (sample.args, sample.kwargs))
    try:
        got = pytree.tree_leaves(sample.target(*args, **kwargs))
    except Exception:  # an operator that refuses parts
        return False
    return len(got) == len(expected) and all(difference(g, narrow(e, dim))[1] <= TOLERANCE.get(e.dtype, 0.0) for g, e in zip(got, expected, strict=True))


def rule_name(target: Any) -> str:
    """`view.permute`: the file and function of an operator's rule."""
    rule = registry.find(target)
    assert rule is not None
    return f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}"


def samples_of(names: Iterable[str] = (), per_function: int = 3, per_operator: int = 3) -> dict[Any, list[Sample]]:
    """Samples of every operator with a rule, sorted by name. `names`: only operators of this name (`view`) or overload (`aten.view.default`).

    Raises:
        SeqparError: PyTorch's sample inputs cannot be imported.
    """
    names = set(names)

    def wanted(target: Any) -> bool:
        return not names or bool(names & {str(target), str(target).split(".")[1]})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_hand = [s for s in hand_samples() if wanted(s.target) and registry.find(s.target) is not None]
        table = chosen(from_op_db(per_function, {n.split(".")[1] if "." in n else n for n in names}), per_operator)
        for target, samples in chosen(by_hand, len(by_hand)).items():
            table[target] = samples + table.get(target, [])
    return {target: table[target] for target in sorted(table, key=str) if wanted(target)}


def check_all(table: Mapping[Any, Sequence[Sample]]) -> list[Verdict]:
    """One verdict per operator of a table of samples."""
    verdicts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for target, samples in table.items():
            verdict = Verdict(str(target), rule_name(target))
            for sample in samples:
                check_sample(sample, verdict)
            verdicts.append(verdict)
    return verdicts


def unsampled(operators: Iterable[str]) -> list[str]:
    """Operators with a rule of their own that are not among these."""
    seen = set(operators)
    return sorted(str(t) for t in registry.targets() if str(t) not in seen)


def print_table(verdicts: Sequence[Verdict]) -> None:
    print(f"{'operator':48} {'rule':28} {'samples':>7} {'claims':>7} {'wrong':>6} {'missed':>6}")
    for v in verdicts:
        print(f"{v.operator:48} {v.rule:28} {v.samples:7} {v.claims:7} {len(v.wrong):6} {len(v.missed):6}")
        for kind, lines in (("wrong", v.wrong), ("missed", v.missed)):
            for line in lines:
                print(f"    {kind}: {line}")
    claims, wrong, missed = (sum(n) for n in zip(*((v.claims, len(v.wrong), len(v.missed)) for v in verdicts), strict=True)) if verdicts else (0, 0, 0)
    print(f"{len(verdicts)} operators, {claims} claims tried, {wrong} wrong, {missed} right but not claimed")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqpar.tools.check_rules", description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("operators", nargs="*", metavar="OP", help="operator names such as view or aten.view.default; all if none is given")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    parser.add_argument("--samples", type=int, default=6, help="samples of PyTorch's table per operator")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        verdicts = check_all(samples_of(options.operators, options.samples, options.samples))
    except SeqparError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(v) for v in verdicts], indent=1))
    else:
        print_table(verdicts)
        if not options.operators:
            print("no sample:", ", ".join(unsampled(v.operator for v in verdicts)) or "none")
    return int(any(v.wrong for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
