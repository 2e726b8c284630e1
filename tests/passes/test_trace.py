"""Tracing: the graph computes what the model computes, to the bit, and the model stays as it was."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from seqpar.errors import SignatureError, TraceError
from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.passes.arguments import canonical_call
from seqpar.passes.guards import failed_guard, guards_hold
from seqpar.passes.share import with_graph
from seqpar.passes.trace import trace
from seqpar.verification import verify

NAMES = ("flux", "qwen-image", "z-image", "wan")


def tiny(name):
    family = registry.get(name)
    config = family.tiny_config(2, 1)
    return family, config, randomise(family.build(config))


def tensors_of(traced, inputs):
    call = canonical_call(traced.call.signature, (), inputs)
    return [call.leaves[i] for i in traced.input_positions]


def run(traced, inputs):
    with torch.no_grad():
        outputs = traced.gm(*tensors_of(traced, inputs))
    return tree_unflatten(list(outputs[: traced.num_outputs]), traced.out_spec)


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_graph_equals_the_model(name, return_dict):
    family, config, model = tiny(name)
    inputs = family.grid_inputs(config, rows=4, columns=4, text_len=5, return_dict=return_dict)
    traced = trace(model, (), inputs, dynamic=None if return_dict else False)
    with torch.no_grad():
        assert_same(run(traced, inputs), model(**inputs))
    names = {node.target for node in traced.gm.graph.nodes if node.op == "get_attr"}
    assert names <= model.state_dict().keys() | dict(model.named_buffers()).keys() | traced.constants.keys()
    assert not any("assert" in str(node.target) for node in traced.gm.graph.nodes)
    assert not any(isinstance(value, FakeTensor) for module in model.modules() for value in tree_leaves(list(vars(module).values())))


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_one_symbolic_program_serves_three_resolutions(name):
    family, config, model = tiny(name)
    traced = trace(model, (), family.grid_inputs(config, rows=4, columns=4, text_len=5))
    assert traced.shape_env is not None and traced.symbols
    for rows, columns, text_len in ((4, 4, 5), (6, 4, 9), (3, 5, 7)):
        inputs = family.grid_inputs(config, rows=rows, columns=columns, text_len=text_len)
        assert guards_hold(traced, [t.shape for t in tensors_of(traced, inputs)])
        with torch.no_grad():
            assert_same(run(traced, inputs), model(**inputs))


def test_guards_name_what_does_not_hold():
    family, config, model = tiny("wan")
    traced = trace(model, (), family.grid_inputs(config, rows=4, columns=4, times=2, text_len=5))
    shapes = [list(t.shape) for t in tensors_of(traced, family.grid_inputs(config, rows=4, columns=4, times=2, text_len=5))]
    symbol = next(s for s, place in traced.symbols.items() if place == (0, 2))
    assert failed_guard(traced, shapes) is None
    assert "hidden_states.shape[2]" in failed_guard(traced, shapes, [symbol > 2])
    shapes[0][1] += 1
    assert "hidden_states.shape[1]" in failed_guard(traced, shapes)


@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_programs_that_depend_on_python_sizes_are_fixed(name):
    family, config, model = tiny(name)
    traced = trace(model, (), family.grid_inputs(config, rows=4, columns=4, text_len=5))
    assert traced.shape_env is None and not traced.symbols
    longer = tensors_of(traced, family.grid_inputs(config, rows=4, columns=4, text_len=6))
    assert not guards_hold(traced, [t.shape for t in longer])


def test_hidden_guards_are_checked():
    """With symbols forced, Z-Image accepts other sizes with as many tokens, and nothing else."""
    family, config, model = tiny("z-image")
    traced = trace(model, (), family.grid_inputs(config, rows=4, columns=8, text_len=5), dynamic=True)
    for rows, columns, text_len, valid in ((8, 4, 5, True), (8, 8, 5, False), (4, 8, 6, False)):
        inputs = family.grid_inputs(config, rows=rows, columns=columns, text_len=text_len)
        assert guards_hold(traced, [t.shape for t in tensors_of(traced, inputs)]) is valid
        if valid:
            with torch.no_grad():
                assert_same(run(traced, inputs), model(**inputs))


class Counter(nn.Module):
    """Writes to a buffer and to an input, memoises a table in a plain object, returns constants."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.tables = {}

    def forward(self, x, log, scale: float = 2.0):
        self.calls += 1
        log.add_(x.sum())
        if "ramp" not in self.tables:
            self.tables["ramp"] = torch.arange(4.0)
        return {"out": self.proj(x) * scale + self.tables["ramp"], "calls": self.calls, "n": 7, "none": None}


def test_mutations_literals_and_shared_parameters():
    model = Counter()
    inputs = {"x": torch.randn(3, 4), "log": torch.zeros(1)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    traced = trace(model, (), inputs, dynamic=False)
    assert torch.equal(torch.get_rng_state(), random_state) and torch.equal(inputs["log"], torch.zeros(1))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [(m.buffer, m.placeholder) for m in traced.mutations] == [("calls", None), (None, 1)]
    result = run(traced, inputs)
    assert result["n"] == 7 and result["none"] is None
    with torch.no_grad():
        model.proj.weight.mul_(2)
        assert torch.equal(run(traced, inputs)["out"], model(**inputs)["out"])
        model.proj = nn.Linear(4, 4)
        assert torch.equal(run(traced, inputs)["out"], model(**inputs)["out"])
    assert traced.gm.state_dict().keys() == before.keys()
    again = with_graph(traced.gm, traced.gm.graph)
    assert again.proj is model.proj and "ramp" not in model.state_dict()


class ReadsData(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(2, 1)

    def forward(self, x, mask):
        if self.gate(x) > 0:
            return x
        return x * 2


class Longest(nn.Module):
    """Python's own `max` of the numbers in a tensor."""

    def forward(self, x, lengths):
        return x[:, min(lengths) : max(lengths).item()] * max(2, x.shape[1]) + torch.maximum(x[:, :1], x[:, 1:2])


def test_the_largest_of_a_tensor():
    x = torch.randn(2, 9, 3)
    report = verify(Longest(), (x, torch.tensor([2, 7, 4])), ulysses=2)
    assert report.ok, report


class Fails(nn.Module):
    def forward(self, x):
        return x @ x


def test_errors_name_operator_line_and_remedy():
    with pytest.raises(TraceError) as caught:
        trace(ReadsData(), (torch.ones(2), torch.ones(2, dtype=torch.bool)), {})
    message = str(caught.value)
    assert "if self.gate(x) > 0:" in message and "test_trace.py" in message and "Python argument" in message and "operator" in message
    with pytest.raises(TraceError, match="fails on the example inputs"):
        trace(Fails(), (torch.ones(2, 3),), {})
    with pytest.raises(SignatureError, match="'y'"):
        trace(Fails(), (), {"x": torch.ones(2, 2), "y": 1})
    with pytest.raises(TraceError, match="dynamic=True"):
        trace(Fails(), (torch.ones(1, 1),), {}, dynamic=True)


def test_a_program_traced_in_inference_mode_is_differentiable():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    with torch.inference_mode():
        traced = trace(model, (torch.randn(3, 4),), {}, dynamic=False)
    x = torch.randn(3, 4)
    gradients = [torch.autograd.grad(out.square().sum(), model[0].weight)[0] for out in (traced.gm(x)[0], model(x))]
    assert torch.allclose(*gradients)


def test_meta_tensors():
    family = registry.get("flux")
    config = family.tiny_config(2, 1)
    traced = trace(family.build(config, device="meta"), (), family.grid_inputs(config, rows=4, columns=4, text_len=5, device="meta"))
    assert all(node.meta["val"].device.type == "meta" for node in traced.gm.graph.nodes if node.op == "placeholder")


def test_an_error_of_a_later_pass_names_the_line_of_the_operator():
    """The line is told in the message only: no frame of the model is left."""

    class WritesToAView(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x, hidden):
            q, k, v = (t.view(2, 5, 2, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            v.masked_fill_(hidden[:, None, :, None], 0.0)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    with torch.no_grad(), pytest.raises(TraceError, match=r"where: .*test_trace.py:\d+ in forward: v.masked_fill_"):
        trace(WritesToAView(), (torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)), {}, dynamic=False)


class SwitchesGradients(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.linear, self.whole = nn.Linear(4, 4), whole

    def forward(self, x):
        with torch.no_grad():
            x = self.linear(x)
        with torch.enable_grad():
            x = self.linear(x * 2)
            if self.whole:
                return x + 1
        return x


@pytest.mark.parametrize("whole", [False, True], ids=["part", "to-the-end"])
def test_gradients_switched_on_and_off_make_no_subgraphs(whole):
    model, x = SwitchesGradients(whole), torch.randn(3, 4)
    traced = trace(model, (x,), {})
    assert torch.is_grad_enabled()
    assert not any("grad" in str(node.target) for node in traced.gm.graph.nodes)
    assert_same(run(traced, {"x": x}), model(x).detach())


class Lengths(nn.Module):
    """Samples of several lengths, as numbers in a tensor."""

    def forward(self, samples):
        lengths = torch.tensor([len(x) for x in samples])
        assert lengths.max() <= 9
        return torch.stack([x[:n].sum(0) for x, n in zip(samples, lengths.tolist(), strict=True)])


def test_numbers_in_a_tensor_are_known_on_meta():
    here, there = ([torch.randn(n, 3, device=device) for n in (9, 4)] for device in ("cpu", "meta"))
    graphs = [trace(Lengths(), (samples,), {}, dynamic=False).gm.graph for samples in (here, there)]
    ours, theirs = ([(n.op, str(n.target), n.meta["val"].shape) for n in graph.nodes if "val" in n.meta] for graph in graphs)
    assert ours == theirs and any("slice" in target or "sum" in target for _, target, _ in ours)
