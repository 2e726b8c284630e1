"""The report as text and as JSON."""

import json
from dataclasses import replace

import pytest

from seqpar.tools.report import Comparison, RunReport, describe_seconds

REPORT = RunReport(
    model="tiny:flux",
    pipeline="FluxPipeline",
    device="cpu",
    dtype="float32",
    ulysses=2,
    ring=1,
    width=64,
    height=32,
    frames=1,
    output="x.png",
    seconds_per_step=[3.0, 0.5, 0.25, 0.5],
    peak_memory_bytes=[2**30, 2**29, 0, 0],
    plans=[{"world_size": 2}, {"world_size": 2}],
    explanations=["first plan\n", "second plan\n"],
)
COMPARISON = Comparison(
    max_abs_pixel_difference=2e-6, relative_latent_difference=2.5e-7, seconds_per_step=[1.0], side_by_side="x_compare.png"
)


def test_text_has_every_number():
    text = REPORT.to_text()
    assert text.startswith("first plan\n(and 1 more compiled program;") and "second plan" not in text
    assert "4 = 2 x ring 1 x ulysses 2" in text
    assert "first 3 s, then 0.5 s (median of 3)" in text
    assert "1,024 MiB, 512 MiB" in text
    assert text.splitlines()[-1] == "picture        x.png  (64 x 32)"


def test_text_ends_with_the_difference():
    *_, picture, side, difference = replace(REPORT, comparison=COMPARISON, frames=5).to_text().splitlines()
    assert "x.png" in picture and "5 frames" in picture
    assert "x_compare.png" in side
    assert difference == "difference     latents 2.50e-07 (relative), pixels 2.00e-06 of 1 (largest) = 0.00051 of 255 levels"


def test_text_says_when_nothing_was_sharded():
    assert replace(REPORT, plans=[], explanations=[]).to_text().startswith("plan           none")


def test_json():
    as_dict = json.loads(json.dumps(replace(REPORT, comparison=COMPARISON).to_dict()))
    assert as_dict["world_size"] == 4 and as_dict["comparison"]["relative_latent_difference"] == 2.5e-7
    assert len(as_dict["plans"]) == 2 and "explanations" not in as_dict


def test_invariant_and_one_step():
    with pytest.raises(ValueError, match="2 plans"):
        replace(REPORT, explanations=[])
    assert describe_seconds([2.0]) == "first 2 s"
