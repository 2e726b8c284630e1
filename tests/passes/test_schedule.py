"""Order of the emitted programs: exchanges behind work, the same collectives on every rank, the same bits."""

import pytest
import torch
import torch._dynamo
from torch import fx, nn
from torch.nn import functional as F

import seqpar
from seqpar.partitioner.cost import Machine
from seqpar.passes.bind import bind_groups
from seqpar.passes.count import count
from seqpar.passes.options import Options
from seqpar.passes.pipeline import partition
from seqpar.passes.save_graph import Constants, read_constants, read_graph, write_graph
from seqpar.passes.save_values import Codec
from seqpar.passes.schedule import MEMORY_BOUND, Step, _Program, collectives_of, schedule
from seqpar.passes.trace import trace
from seqpar.runtime.head_shares import finish_pieces_to_seq, start_pieces_to_seq
from seqpar.runtime.layout import finish_gather, finish_gather_many, gather, start_gather, start_gather_many
from seqpar.runtime.mesh import build_mesh
from seqpar.runtime.ring import ring_attention
from seqpar.runtime.ulysses import (
    finish_heads_to_seq,
    finish_seq_to_heads,
    seq_to_heads,
    start_heads_to_seq,
    start_seq_to_heads,
)
from seqpar.verification import simulate, verify, verify_traced

aten = torch.ops.aten
AS_EMITTED = Options(schedule=False)


class Parallel(nn.Module):
    """Attention and an MLP that both read the normed input, modulated by a vector: the MLP comes first, and could come last."""

    def __init__(self, width=16, heads=4, kv_heads=4):
        super().__init__()
        self.up, self.mod = nn.Linear(width, 4 * width), nn.Linear(width, 2 * width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * kv_heads * (width // heads))
        self.out = nn.Linear(5 * width, width)
        self.head = width // heads

    def forward(self, x, vector):
        shift, scale = self.mod(F.silu(vector)).unsqueeze(1).chunk(2, -1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        mlp = F.gelu(self.up(y))
        q, k, v = (t.unflatten(-1, (-1, self.head)).transpose(1, 2) for t in (self.q(y), *self.kv(y).chunk(2, -1)))
        o = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2).flatten(2)
        return x + self.out(torch.cat([o, mlp], -1))


class Blocks(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.blocks = nn.ModuleList(Parallel(**sizes) for _ in range(2))

    def forward(self, text, image, vector):
        x = torch.cat([text, image], 1)
        for block in self.blocks:
            x = block(x, vector)
        return x[:, text.shape[1] :]


def traced(text=5, image=24, **sizes):
    torch.manual_seed(0)
    width = sizes.get("width", 16)
    return trace(Blocks(**sizes), (torch.randn(2, text, width), torch.randn(2, image, width), torch.randn(2, width)), {}, dynamic=False)


def inputs_of(found):
    return [found.call.leaves[i].contiguous() for i in found.input_positions]


@pytest.fixture(scope="module")
def model():
    return traced()


def between(nodes, start, finish):
    """Targets between each start and its finish."""
    places = [(nodes.index(n.args[0]), nodes.index(n)) for n in nodes if n.target is finish]
    assert all(nodes[a].target is start for a, _ in places)
    return [[n.target for n in nodes[a + 1 : b]] for a, b in places]


def test_the_mlp_of_a_parallel_block_is_between_start_and_finish(model):
    partitioned = partition(model, ulysses=2)
    before, after = list(partitioned.emitted(0).graph.nodes), list(partitioned.program(0).graph.nodes)
    targets = [n.target for n in before]
    assert targets.index(aten.gelu.default) < targets.index(seq_to_heads) and start_seq_to_heads not in targets
    moved = between(after, start_seq_to_heads, finish_seq_to_heads)
    assert len(moved) == 2 and all(aten.linear.default in found and aten.gelu.default in found for found in moved)
    assert aten.scaled_dot_product_attention.default not in sum(moved, [])
    for start in (n for n in after if n.target is start_seq_to_heads):
        late = [n for n in after[: after.index(start)] if n.target is aten.gelu.default and not any(after.index(u) < after.index(start) for u in n.users)]
        assert not late, "what the exchange does not need comes after its start"
    assert sorted(n.name for n in before) == sorted(n.name for n in after if n.target not in (start_seq_to_heads, start_heads_to_seq))


def test_work_of_the_next_block_is_behind_the_exchange_back(model):
    partitioned = partition(model, ulysses=2)
    slow = Machine(flops_per_s=1e9)  # the first product alone hides the exchange
    nodes = list(schedule(partitioned.emitted(0), partitioned.counts[0], slow).graph.nodes)
    moved = between(nodes, start_heads_to_seq, finish_heads_to_seq)
    assert [aten.gelu.default in found for found in moved] == [True, True], "the rest of the MLP"
    assert aten.linear.default in moved[0] and aten.linear.default not in moved[1], "the next modulation; the last block has none"


def test_work_is_behind_gathered_keys_and_values():
    """A link on which two ranks gather keys and values, both in one collective: the MLP and the queries are on the other side of it."""
    found = traced(text=4, image=60, heads=4, kv_heads=1)
    link = Machine(flops_per_s=1e10, bytes_per_s=1e9, latency_s=1e-6).at_real_rates()
    partitioned = partition(found, ulysses=2, machine=link)
    assert [a.strategy for a in partitioned.plan.attention] == ["local", "gather K/V"], "the first block's keys come from the inputs, which are whole"
    moved = between(list(partitioned.program(0).graph.nodes), start_gather_many, finish_gather_many)
    assert len(moved) == 1 and aten.linear.default in moved[0] and aten.scaled_dot_product_attention.default not in moved[0]
    report = verify_traced(found, ulysses=2, ring=1, machine=link)
    assert report.ok, report


def test_work_of_the_next_block_is_behind_the_exchange_back_of_shared_heads():
    """Six heads on four ranks: two are shared by rows, and their pieces come back while the next modulation is worked out."""
    found = traced(text=8, image=120, heads=6, kv_heads=6, width=48)
    slow = Machine(flops_per_s=1e9, bytes_per_s=1e9, latency_s=1e-6).at_real_rates()  # balance is worth a call, and the first product alone hides the exchange
    partitioned = partition(found, ulysses=4, machine=slow)
    nodes = list(partitioned.program(0).graph.nodes)
    moved = between(nodes, start_pieces_to_seq, finish_pieces_to_seq)
    assert moved and aten.linear.default in moved[0], [a.strategy for a in partitioned.plan.attention]
    assert collectives_of(partitioned.program(0).graph) == collectives_of(partitioned.emitted(0).graph) == partitioned.collectives(1)
    assert verify_traced(found, ulysses=4, ring=1, machine=slow).ok
    plain = partition(found, ulysses=4, machine=slow, options=AS_EMITTED)
    for here, there in zip(simulate(partitioned, inputs_of(found)), simulate(plain, inputs_of(found)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize(("mesh", "sizes"), [((2, 1), {}), ((2, 2), {"text": 3, "image": 17}), ((4, 1), {"heads": 6, "kv_heads": 3, "width": 24}), ((3, 1), {"text": 1, "image": 7}), ((1, 2), {})])
def test_the_same_bits_and_the_same_collectives_on_all_ranks(mesh, sizes):
    found = traced(**sizes)
    partitioned, plain = (partition(found, ulysses=mesh[0], ring=mesh[1], options=options) for options in (Options(), AS_EMITTED))
    orders = {tuple(partitioned.collectives(rank)) for rank in range(mesh[0] * mesh[1])}
    assert orders == {tuple(collectives_of(plain.program(0).graph))} and len(*orders) >= 3
    for here, there in zip(simulate(partitioned, inputs_of(found)), simulate(plain, inputs_of(found)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert verify_traced(found, ulysses=mesh[0], ring=mesh[1]).ok


def test_buffers_are_alive_while_they_are_on_their_way():
    graph = fx.Graph()
    x = graph.placeholder("x")
    moved = graph.call_function(gather, (x, 0, ((4, 4),)), {"group": "sp"})
    output = graph.output((moved,))
    counts = count(fx.GraphModule(nn.Module(), graph), [torch.ones(4, 2)], ulysses=2, ring=1, rank=0)
    peak = _Program(graph, counts, Machine()).peak([Step(x), Step(moved, 0), Step(moved, 1), Step(output)])
    assert peak == 2 * 32 + 64, "what is sent and what arrives (4 x 2 numbers of 4 bytes each), and the result"


def test_memory_stays_within_the_bound():
    found = traced(text=64, image=960)
    partitioned = partition(found, ulysses=2)
    before, after = partitioned.emitted(0), partitioned.program(0)
    assert before is not after
    peaks = []
    for gm in (before, after):
        program = _Program(gm.graph, partitioned.counts[0], partitioned.machine)
        peaks.append(program.peak([Step(n) for n in gm.graph.nodes]))
    program = _Program(before.graph, partitioned.counts[0], partitioned.machine)
    assert peaks[0] == pytest.approx(program.peak([Step(n) for n in before.graph.nodes]))
    assert 0 < peaks[1] <= MEMORY_BOUND * peaks[0]


@pytest.mark.parametrize(("rows", "taken"), [(4, True), (4096, False)])
def test_work_that_would_stay_alive_too_long_is_not_put_behind_an_exchange(rows, taken):
    """What is made while the exchange is on its way is held beside what is made of the exchange: twice the memory, where it is as large."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    moved = graph.call_function(gather, (x, 0, ((4, 4),)), {"group": "sp"})
    first = graph.call_function(aten.sum.dim_IntList, (graph.call_function(aten.repeat.default, (moved, [2048, 1])), [0]))
    last = graph.call_function(gather, (first, 0, ((2, 2),)), {"group": "sp"})
    graph.output((last, graph.call_function(aten.sum.dim_IntList, (graph.call_function(aten.repeat.default, (y, [rows, 1])), [0]))))
    gm = fx.GraphModule(nn.Module(), graph)
    scheduled = schedule(gm, count(gm, [torch.ones(4, 2)] * 2, ulysses=2, ring=1, rank=0), Machine(latency_s=1e-6))  # one operator takes longer
    places = [n.args[1] for n in scheduled.graph.nodes if n.target is aten.repeat.default]
    assert places == ([[rows, 1], [2048, 1]] if taken else [[2048, 1], [rows, 1]])


def test_a_program_with_nothing_to_move_is_returned_as_it_is():
    class Alone(nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (2, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q * 2, q * 3).transpose(1, 2).flatten(2)

    partitioned = partition(trace(Alone(), (torch.randn(1, 16, 8),), {}, dynamic=False), ulysses=2)
    assert schedule(partitioned.emitted(0), partitioned.counts[0]) is partitioned.emitted(0) is partitioned.program(0)


def test_a_scheduled_program_is_saved_and_printed(model):
    partitioned = partition(model, ulysses=2)
    codec = Codec(torch.device("cpu"))
    constants = Constants(codec)
    gm = partitioned.program(0)
    data = write_graph(gm, constants)
    back = read_graph(data, model.gm, read_constants({"tensors": constants.tensors, "calls": constants.calls}, constants.raw.__getitem__, codec), torch.device("cpu"), "P")
    assert [(n.name, n.target) for n in back.graph.nodes] == [(n.name, n.target) for n in gm.graph.nodes]
    assert partitioned.plan.comm_calls["all_to_all"] == 4 and "4 all_to_all" in partitioned.plan.explain()


def on_a_rank(ulysses, ring):
    """Is the scheduled program's result on real ranks the emitted one's, bit for bit; and compiled."""
    mesh, found = build_mesh(ulysses, ring), traced(text=3, image=17)
    scheduled, plain = (bind_groups(partition(found, ulysses=ulysses, ring=ring, options=options).program(mesh.rank), mesh) for options in (Options(), AS_EMITTED))
    targets = {n.target for n in scheduled.graph.nodes}
    with torch.no_grad():
        (expected,) = plain(*inputs_of(found))
        (eager,) = scheduled(*inputs_of(found))
        (compiled,) = torch.compile(scheduled, backend="aot_eager", fullgraph=True)(*inputs_of(found))
    return (start_seq_to_heads in targets, ring_attention in targets), torch.equal(eager, expected), (compiled - expected).abs().max().item()


@pytest.mark.parametrize("mesh", [(4, 1), (2, 2)])
def test_real_ranks(ranks, mesh):
    for targets, same, error in ranks.run(on_a_rank, *mesh):
        assert targets == (True, mesh[1] > 1) and same and error < 1e-6


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = Blocks()

    def forward(self, text, latents, timestep):
        angles = timestep[:, None] * torch.logspace(0, -3, 8)
        return self.blocks(text, latents, torch.cat([angles.sin(), angles.cos()], -1))


STEPS = 50


def with_inductor():
    """Denoising, step by step, compiled at the first: (worst error, graphs compiled, graph breaks, whether exchanges are taken apart)."""
    torch.manual_seed(1)
    model, text, latents = Denoiser(), torch.randn(2, 3, 16), torch.randn(2, 17, 16)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    expected, worst, times = latents, 0.0, torch.linspace(1000, 1, STEPS)
    fast = seqpar.sp_compile(model, (text, latents, times[:1].expand(2)), ulysses=2, backend="inductor", dynamic=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for step, time in enumerate(times):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                latents = 0.9 * latents + 0.1 * fast(text, latents, time.expand(2)).tanh()
            expected = 0.9 * expected + 0.1 * model(text, expected, time.expand(2)).tanh()
            worst = max(worst, (latents - expected).abs().max().item())
    counters = torch._dynamo.utils.counters
    return worst, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), "start_seq_to_heads" in fast.print_readable(print_output=False)


def test_inductor_compiles_once_for_fifty_denoising_steps(two_ranks):
    for error, graphs, breaks, split in two_ranks.run(with_inductor):
        assert error < 1e-5 and (graphs, breaks) == (1, 0) and split


def test_what_a_user_verifies_is_scheduled():
    torch.manual_seed(0)
    report = verify(Blocks(), (torch.randn(2, 5, 16), torch.randn(2, 24, 16), torch.randn(2, 16)), ulysses=2, ring=2)
    assert report.ok and report.plan.comm_calls["all_to_all"] == 4


class Two(nn.Module):
    """Two attentions that do not need each other, and work on both results."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 96), nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        parts = self.qkv(x).unflatten(-1, (6, 4, -1)).permute(2, 0, 3, 1, 4)
        a, b = (F.scaled_dot_product_attention(*parts[i : i + 3]).transpose(1, 2).flatten(2) for i in (0, 3))
        return self.out[0](a) + self.out[1](b) * self.out[2](a).sigmoid()


@pytest.mark.parametrize("latency", [20e-6, 1.0])
def test_two_exchanges_in_flight(latency):
    torch.manual_seed(0)
    found = trace(Two(), (torch.randn(2, 13, 16),), {}, dynamic=False)
    partitioned = partition(found, ulysses=2)
    before = partitioned.emitted(1)
    after = schedule(before, partitioned.counts[1], Machine(latency_s=latency))
    nodes = list(after.graph.nodes)
    flying = 0, 0
    for node in nodes:
        now = flying[1] + (node.target in (start_seq_to_heads, start_heads_to_seq)) - (node.target in (finish_seq_to_heads, finish_heads_to_seq))
        flying = max(flying[0], now), now
    assert flying == (2, 0), "both are on their way at once, and all arrive"
    assert sorted(n.name for n in nodes if not n.name.endswith("_wire")) == sorted(n.name for n in before.graph.nodes), "everything is done once"
    assert collectives_of(after.graph) == collectives_of(before.graph) and verify_traced(found, ulysses=2, ring=1, machine=Machine(latency_s=latency)).ok


def test_what_fills_one_exchange_is_not_done_again_after_another():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    first, second = (graph.call_function(gather, (value, 0, ((4, 4),)), {"group": "sp"}) for value in (x, y))
    graph.output(tuple(graph.call_function(aten.cumsum.default, (value, 0)) for value in (first, second)))
    gm = fx.GraphModule(nn.Module(), graph)
    scheduled = schedule(gm, count(gm, [torch.ones(4, 2)] * 2, ulysses=2, ring=1, rank=0), Machine(latency_s=1.0))
    targets = [n.target for n in scheduled.graph.nodes if n.op == "call_function"]
    assert targets == [start_gather, start_gather, finish_gather, aten.cumsum.default, finish_gather, aten.cumsum.default]
