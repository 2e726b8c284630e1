"""The memory estimate against what real tensors take."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import seqpar
from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.passes.count import counting_groups
from seqpar.passes.live_bytes import LiveBytes
from seqpar.passes.memory import peak_bytes, weight_bytes
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.runtime.counting import Traffic
from seqpar.verification import SimulatedInterpreter


@pytest.fixture(scope="module")
def case():
    family = registry.get("pattern-rope")
    config = family.tiny_config(heads=4, layers=2)
    model = randomise(family.build(config))
    inputs = family.grid_inputs(config, rows=16, columns=16)
    traced = trace(model, (), inputs, dynamic=False)
    return model, traced, [traced.call.leaves[i].contiguous() for i in traced.input_positions]


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_estimate_is_what_real_tensors_take(case, ulysses, ring):
    """Real kernels on real tensors; collectives return buffers of the right sizes. Attention by a kernel that keeps no scores."""
    model, traced, inputs = case
    partitioned = partition(traced, ulysses=ulysses, ring=ring)
    for rank in {0, ulysses * ring - 1}:
        gm = partitioned.program(rank)
        live = LiveBytes([*model.parameters(), *model.buffers(), *traced.constants.values(), *inputs])
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION), live:
            SimulatedInterpreter(gm, counting_groups(ulysses, ring, rank, Traffic()), rank, None).run(*inputs)
        estimate = peak_bytes(gm, inputs, ulysses=ulysses, ring=ring, rank=rank)
        assert estimate == pytest.approx(live.peak, rel=0.06) and estimate > 100_000  # a kernel's other results differ by device


def on_every_rank():
    family = registry.get("pattern-rope")
    config = family.tiny_config(heads=4, layers=1)
    model = family.build(config)
    inputs = family.grid_inputs(config, rows=16, columns=16)
    fast = seqpar.sp_compile(model, inputs, ulysses=2, ring=2, dynamic=False)
    live = LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()])
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION), live:
        fast(**inputs)
    return live.peak, fast.plan.details.memory.peak


def test_the_estimate_is_what_ranks_take(ranks):
    for real, estimate in ranks.run(on_every_rank):
        assert estimate == pytest.approx(real, rel=0.1)


def test_weights_are_counted_once_each(case):
    model, traced, _ = case
    own = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    extra = sum(c.untyped_storage().nbytes() for c in traced.constants.values())
    assert weight_bytes(traced.gm) == own + extra
    tied = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    graph = torch.fx.Graph()
    graph.output((graph.get_attr("0.weight"), graph.get_attr("1.weight")))
    assert weight_bytes(torch.fx.GraphModule(tied, graph)) == 4 * 4 * 4
