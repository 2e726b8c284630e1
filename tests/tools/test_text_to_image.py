"""The tool as a user starts it: tiny pipelines, in one process, on local ranks, and under torchrun."""

import argparse
import json
import os
import re
import subprocess
import sys

import PIL.Image
import pytest

from seqpar.models.checkpoints import build_checkpoint
from seqpar.tools import text_to_image

pytestmark = pytest.mark.launches

SMALL = ["--prompt", "a lighthouse", "--width", "64", "--height", "64", "--num-inference-steps", "2", "--device", "cpu"]
TOOL = ["-m", "seqpar.tools.text_to_image"]
# float32, 2 steps: measured 4e-8 to 2e-7
LATENTS = 2e-6
PIXELS = 2e-5


def run_tool(launcher, arguments, folder):
    """The tool's JSON report from a process of its own, and what it wrote to stderr."""
    command = [*launcher, *TOOL, *SMALL, *arguments, "--compare", "--json", "--output", str(folder / "out.png")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SEQPAR_LOGS": "compile"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def check_pictures(folder, size=(64, 64)):
    with PIL.Image.open(folder / "out.png") as alone, PIL.Image.open(folder / "out_compare.png") as both:
        assert alone.size == size and both.size == (2 * size[0] + 2, size[1])
        assert all(low < high for low, high in alone.getextrema()), "not constant"
        assert both.crop((0, 0, *size)).tobytes() == alone.tobytes()


def test_four_local_ranks(tmp_path):
    folder = build_checkpoint("flux", tmp_path / "checkpoint", layers=1)
    report, messages = run_tool([sys.executable], ["--model", str(folder), "--ulysses-degree", "2", "--ring-degree", "2"], tmp_path)
    assert report["comparison"]["relative_latent_difference"] < LATENTS
    assert report["comparison"]["max_abs_pixel_difference"] < PIXELS
    assert len(report["seconds_per_step"]) == 2 and len(report["peak_memory_bytes"]) == 4
    (plan,) = report["plans"]
    assert plan["world_size"] == 4 and plan["comm_calls"]["ring"] and plan["sharded_flop_fraction"] > 0.8
    for rank in range(4):
        assert messages.count(f"[seqpar.compile rank {rank}] FluxTransformer2DModel: a program") == 1, "one program serves all steps"
    assert "%|" not in messages, "no progress bars where nobody watches"
    check_pictures(tmp_path)


def test_under_torchrun(tmp_path):
    folder = build_checkpoint("longcat-image", tmp_path / "checkpoint", layers=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    report, _ = run_tool(torchrun, ["--model", str(folder), "--ring-degree", "2"], tmp_path)
    assert report["ring"] == report["world_size"] == 2
    assert report["comparison"]["relative_latent_difference"] < LATENTS
    check_pictures(tmp_path)


def test_one_process(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert text_to_image.main(["--model", "tiny:flux", *SMALL, "--compare", "--output", str(tmp_path / "out.png")]) == 0
    captured = capsys.readouterr()
    *_, picture, side_by_side, difference = captured.out.splitlines()
    assert captured.err.count("steps:   0%|") == captured.err.count("one process:   0%|") == 1, "one progress bar each"
    assert str(tmp_path / "out.png") in picture and "out_compare.png" in side_by_side
    assert float(re.search(r"difference +latents (\S+) ", difference)[1]) < LATENTS
    check_pictures(tmp_path)


def test_several_frames_are_an_animation(tmp_path):
    arguments = ["--model", "tiny:wan", "--num-frames", "5", "--prompt", "x", "--device", "cpu"]
    output = tmp_path / "out.webp"
    assert text_to_image.main([*arguments, "--width", "32", "--height", "32", "--num-inference-steps", "1", "--output", str(output)]) == 0
    with PIL.Image.open(output) as animation:
        assert animation.n_frames == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny:nonsense"], "nonsense"),
        (["--model", "no/such/pipeline"], "cannot load 'no/such/pipeline'"),
        (["--model", "tiny:flux", "--num-frames", "3", "--output", "x.jpg"], "3 frames do not fit"),
        (["--model", "tiny:flux", "--output", "picture"], "cannot save"),
        (["--model", "tiny:flux", "--pipeline-argument", "strength=2"], "takes no strength"),
    ],
)
def test_bad_requests_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert text_to_image.main([*SMALL, *arguments]) == 1
    errors = capsys.readouterr().err
    assert "error: " in errors and message in errors and "Traceback" not in errors


@pytest.mark.parametrize("arguments", [["--ulysses-degree", "0"], ["--pipeline-argument", "strength"], ["--seed", "x"]])
def test_bad_usage(arguments):
    with pytest.raises(SystemExit) as caught:
        text_to_image.main(["--model", "tiny:flux", "--prompt", "x", *arguments])
    assert caught.value.code == 2


def test_pipeline_arguments_are_json_or_text():
    parser = argparse.ArgumentParser()
    text_to_image.add_arguments(parser)
    arguments = parser.parse_args(["--model", "m", "--prompt", "p", "--pipeline-argument", "scale=1.5", "--pipeline-argument", "mode=fast"])
    assert text_to_image.job_of(arguments).request.extra == {"scale": 1.5, "mode": "fast"}


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        text_to_image.main(["--help"])
    assert "--ulysses-degree 2 --ring-degree 2" in capsys.readouterr().out
