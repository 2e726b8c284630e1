"""Every family's program compiles in one graph, `sp_compile(..., backend=...)`, and equals the model."""

import pytest
import torch

import seqpar
from seqpar.models import registry
from seqpar.models.randomise import randomise

SAME = ("wan-ti2v", "longcat-image", "hunyuan-video", "sd3", "z-image", "ltx-video")  # the class of wan; blocks like those of flux, qwen-image, wan and bagel
REAL = [name for name in registry.names() if not name.startswith("pattern-") and name not in SAME]


def on_two_ranks(name, ulysses, ring):
    """Relative errors of all outputs, how far they are from constant, (graphs, graph breaks)."""
    family = registry.get(name)
    config = family.tiny_config(4, 1)
    model, inputs = randomise(family.build(config)), family.grid_inputs(config, rows=4, columns=5, text_len=5)
    fast = seqpar.sp_compile(model, inputs, ulysses=ulysses, ring=ring, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        pairs = list(zip(*(torch.utils._pytree.tree_leaves(m(**inputs)) for m in (fast, model)), strict=True))
    counters = torch._dynamo.utils.counters
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    return max(errors), min(b.std().item() for _, b in pairs), (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))


@pytest.mark.parametrize("name", REAL)
def test_one_graph_on_two_ranks(two_ranks, name):
    for error, spread, graphs in two_ranks.run(on_two_ranks, name, *((2, 1) if name != "wan" else (1, 2)), timeout=300):
        assert error < 1e-5 and spread > 1e-3 and graphs == (1, 0)
