"""One trace by AOTAutograd makes the graph of torch.export and `run_decompositions({})`; what only torch.export understands takes that way."""

import functools

import pytest
import torch
from torch import fx, nn

from seqpar.compat import FakeTensor
from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.passes import export
from seqpar.passes.trace import trace

aten = torch.ops.aten


@pytest.fixture
def ways(monkeypatch):
    """Which way each export took, in order: True is the short one."""
    taken = []

    def noted(*args):
        program = short(*args)
        taken.append(program is not None)
        return program

    short = export.in_one_trace
    monkeypatch.setattr(export, "in_one_trace", noted)
    return taken


def both(monkeypatch, *args, **kwargs):
    """The trace of each way."""
    short = trace(*args, **kwargs)
    monkeypatch.setattr(export, "in_one_trace", lambda *args: None)
    return short, trace(*args, **kwargs)


def lines(traced):
    """Every operator with its arguments, value and module; slices of everything are left out (torch.export keeps them), copies have one name."""
    same, text = {}, []
    for node in traced.gm.graph.nodes:
        if node.target is aten.slice.Tensor and node.args[2:] == (0, 2**63 - 1):
            same[node] = same[node.args[0]]
            continue
        same[node] = f"%{len(text)}"
        target = aten.clone.default if node.target is aten.lift_fresh_copy.default else node.target
        value = fx.node.map_aggregate(node.meta.get("val"), lambda v: f"{tuple(v.shape)} {v.dtype}" if isinstance(v, torch.Tensor) else str(v))
        module = list(node.meta.get("nn_module_stack", {}).values())[-1:] if node.op != "get_attr" else None
        text.append(f"{node.op} {target} {fx.map_arg(node.args, same.get)} {fx.map_arg(node.kwargs, same.get)} {value} {module}")
    return text


@pytest.mark.parametrize("name", ["flux", "wan", "bagel"])
def test_the_same_graph(name, monkeypatch, ways):
    """Symbols, writes into views, autocast regions, values read from tensors and nested lists."""
    family = registry.get(name)
    config = family.tiny_config(2, 1)
    model, inputs = randomise(family.build(config)), family.grid_inputs(config, rows=4, columns=4, text_len=5)
    short, long = both(monkeypatch, model, (), inputs, dynamic=None if name == "wan" else False)
    assert all(ways) and lines(short) == lines(long)
    assert (short.symbols, short.mutations, short.constants.keys()) == (long.symbols, long.mutations, long.constants.keys())
    assert [read.function for read in short.reads] == [read.function for read in long.reads]
    lost = [node for node in short.gm.graph.nodes if node.op == "call_function" and not node.meta.get("stack_trace")]
    assert len(lost) <= sum(node.op == "call_function" and not node.meta.get("stack_trace") for node in long.gm.graph.nodes)


class Writes(nn.Module):
    """In-place on an input, a view of a buffer, and a table that is no buffer; a buffer used after it was written; dropout."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(2, 4))

    def forward(self, x):
        self.seen[0].add_(x.mean(0))
        y = self.norm(self.proj(x)).reshape(-1, 2, 2)
        y[:, 0] = 1.0
        x.mul_(2)
        return nn.functional.dropout(y, 0.1, self.training).flatten(1) + self.seen[0] + x


@pytest.mark.parametrize("training", [True, False])
def test_writes(training, monkeypatch, ways):
    short, long = both(monkeypatch, Writes().train(training), (torch.randn(3, 4),), {}, dynamic=False)
    assert all(ways) and lines(short) == lines(long) and short.mutations == long.mutations
    assert {mutation.buffer for mutation in short.mutations} >= {"seen", None}


elsewhere = {}


class Remembers(nn.Module):
    """Tables made in the first run: in a `functools.lru_cache`, in an attribute, in a dictionary, in one of the file."""

    def __init__(self):
        super().__init__()
        self.proj, self.table, self.tables = nn.Linear(4, 4), None, {}

    @staticmethod
    @functools.lru_cache(None)
    def ramp(n, device):
        return torch.arange(n, device=device).float()

    def forward(self, x):
        if self.table is None:
            self.table = torch.ones(4, device=x.device).cumsum(0)
        if "sine" not in self.tables:
            self.tables["sine"] = self.table.sin()
        if "cosine" not in elsewhere:
            elsewhere["cosine"] = self.table.cos()
        return self.proj(x) + self.table + self.tables["sine"] + elsewhere["cosine"] + self.ramp(4, x.device)


def test_tables_of_one_run_are_not_met_in_the_next(monkeypatch, ways):
    with torch.device("meta"):
        model, x = Remembers(), torch.randn(3, 4)
    short, long = both(monkeypatch, model, (x,), {}, dynamic=False)
    assert all(ways) and lines(short) == lines(long) and not short.constants
    assert sum(node.target is aten.arange.default for node in short.gm.graph.nodes) == 1
    assert model.table is None and not model.tables and not elsewhere and not isinstance(model.ramp(4, x.device), FakeTensor)


class Assigns(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, x):
        self.calls = self.calls + 1
        return x + self.calls


class WritesToTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.zeros(4)

    def forward(self, x):
        self.table.add_(1)
        return x + self.table


@pytest.mark.parametrize("kind", [Assigns, WritesToTable])
def test_what_only_torch_export_understands(kind, monkeypatch, ways):
    """The outcome, an error included, is that of torch.export."""
    outcomes = []
    with torch.device("meta"):
        for _ in range(2):
            try:
                traced = trace(kind(), (torch.randn(3, 4),), {}, dynamic=False)
                outcomes.append((lines(traced), traced.mutations))
            except Exception as error:
                outcomes.append((type(error), str(error)))
            monkeypatch.setattr(export, "in_one_trace", lambda *args: None)
    assert ways == [False] and outcomes[0] == outcomes[1], outcomes
