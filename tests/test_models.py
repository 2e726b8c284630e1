"""Every family on every mesh, even and uneven, heads divisible and not: all ranks in one process, equal to the model.

Sizes are tiny (3x5 or 4x4 tokens, 2 blocks); each configuration is traced once and partitioned for all meshes. Uneven cells have a batch
of two with a padded prompt where the family has masks; five heads are divisible by no degree and still enough for ulysses=4.
"""

import functools

import pytest
import torch

from seqpar.models import registry
from seqpar.models.family import output_tensors
from seqpar.models.randomise import randomise
from seqpar.passes.trace import Traced, trace
from seqpar.verification import verify_traced

MESHES = {"u2": (2, 1), "r2": (1, 2), "u4": (4, 1), "r4": (1, 4), "u2r2": (2, 2)}
GROUP_BY = ("name", "heads", "lengths")  # one trace for all meshes
THOROUGH = ("flux", "bagel")  # all of heads x lengths
HALF = ("flux", "wan", "z-image", "sd3", "bagel", "pattern-unified")  # in bfloat16, too
CELLS = [
    (name, heads, lengths)
    for name in registry.names()
    for heads, lengths in ((4, "even"), (5, "odd"), (4, "odd"), (5, "even"))
    if name in THOROUGH or (heads, lengths) in ((4, "even"), (5, "odd"))
]
CELLS.append(("bagel", 6, "odd"))  # three key/value heads: groups that ulysses cuts through


@functools.lru_cache(maxsize=1)  # neighbouring tests share it
def traced(name: str, heads: int, lengths: str, dtype: torch.dtype = torch.float32) -> Traced:
    family = registry.get(name)
    config = family.tiny_config(heads)
    model = randomise(family.build(config, dtype=dtype))
    rows, columns, text_len = (4, 4, 8) if lengths == "even" else (3, 5, 7)
    masked = 3 if lengths == "odd" else 0
    times = 1 if family.frames_per_token == 1 else 2
    inputs = family.grid_inputs(config, rows=rows, columns=columns, times=times, text_len=text_len, batch=2, pad_text=masked, dtype=dtype)
    found = trace(model, (), inputs, dynamic=False)
    with torch.no_grad():  # reports compare with the traced graph: it must be the model
        for actual, expected in zip(whole(found), output_tensors(model(**inputs)), strict=True):
            assert (actual - expected).norm() <= 1e-6 * expected.norm()
    return found


def whole(found: Traced) -> list[torch.Tensor]:
    with torch.no_grad():
        return output_tensors(found.gm(*(found.call.leaves[i].contiguous() for i in found.input_positions)))


# Two ranks are tried with the lengths that they do not divide.
CASES = [(*cell, mesh) for cell in CELLS for mesh in MESHES if cell[2] == "odd" or mesh not in ("u2", "r2")]


@pytest.mark.parametrize(("name", "heads", "lengths", "mesh"), CASES)
def test_equals_the_model(name, heads, lengths, mesh):
    ulysses, ring = MESHES[mesh]
    report = verify_traced(traced(name, heads, lengths), ulysses=ulysses, ring=ring)
    assert report.ok and report.max_rel_err <= 1e-5, str(report)
    # An unsharded program would be equal too.
    assert max(report.plan.flops_per_rank) < report.plan.flops_total
    assert heads % ulysses or any(attention.strategy not in ("local", "replicated") for attention in report.plan.attention)


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_and_outputs_that_vary(name):
    found = traced(name, 5, "odd", torch.bfloat16)
    report = verify_traced(found, ulysses=2, ring=2)
    assert report.ok and report.max_rel_err <= 2e-2, str(report)
    for out in whole(found):
        # A constant output would agree with anything.
        assert out.dtype == torch.bfloat16 and out.isfinite().all() and out.float().std() > 0.05
