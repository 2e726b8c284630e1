"""Whole pipelines of other families on two real ranks against one process."""

import pytest
import torch

import seqpar
from seqpar.models.checkpoints import build_checkpoint
from seqpar.tools import pipeline

CPU = torch.device("cpu")


def draw(folder, request, ulysses, ring):
    """(latents of all ranks, latents of this process alone, plan of every program) on each rank."""
    pipeline.be_quiet(warnings=False)
    pipe = pipeline.load(str(folder), CPU, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with seqpar.parallelize(pipe, ulysses=ulysses, ring=ring) as parallel:
        together = pipeline.generate(pipe, request, CPU, decode=False)
        plans = [plan.to_dict() for plan in parallel.plans]
    alone = pipeline.generate(pipe, request, CPU, decode=False)
    return together.latents, alone.latents, plans


@pytest.mark.parametrize(
    ("name", "ulysses", "ring", "programs", "options"),
    [
        ("qwen-image", 2, 1, 1, {"negative_prompt": "dark"}),  # prompts of two lengths
        ("wan", 1, 2, 2, {}),  # a transformer for early and one for late steps
        ("z-image", 1, 2, 1, {}),
    ],
)
def test_pipeline(two_ranks, tmp_path, name, ulysses, ring, programs, options):
    folder = build_checkpoint(name, tmp_path, layers=1)
    request = pipeline.Request("a lighthouse on a cliff", width=96, height=64, num_inference_steps=2, seed=1, **options)
    results = two_ranks.run(draw, folder, request, ulysses, ring, timeout=500)
    for together, alone, plans in results:
        assert len(plans) == programs
        assert all(plan["world_size"] == 2 and plan["comm_calls"]["ring" if ring > 1 else "all_to_all"] for plan in plans)
        assert torch.equal(together, results[0][0]), "every rank has the same latents to the bit"
        assert (together - alone).norm() / alone.norm() < 1e-5
