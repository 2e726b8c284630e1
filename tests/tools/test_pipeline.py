"""Calling a pipeline and timing it; on a stand-in with a real scheduler."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from seqpar.errors import UnsupportedError
from seqpar.tools import pipeline

CPU = torch.device("cpu")


class Pipeline:
    """The part of a diffusers pipeline that the tool relies on."""

    def __init__(self, **components):
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.transformer = torch.nn.Linear(3, 3)
        vars(self).update(components)
        self.calls = []

    @property
    def components(self):
        return {name: part for name, part in vars(self).items() if name != "calls"}

    @torch.no_grad()
    def __call__(self, prompt, width=4, height=4, num_inference_steps=2, generator=None, num_frames=5, output_type="pil", **no):
        assert "timestep" in inspect.signature(self.scheduler.step).parameters  # real pipelines look at it
        self.calls.append({"num_frames": num_frames, "output_type": output_type, "width": width})
        latents = torch.randn(1, height, width, 3, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.transformer(latents), t, latents, return_dict=False)[0]
        return SimpleNamespace(frames=latents[None].numpy())


def test_generate_is_reproducible_and_measured():
    pipe = Pipeline()
    request = pipeline.Request("a", width=6, num_inference_steps=3, seed=1)
    first = pipeline.generate(pipe, request, CPU)
    torch.rand(5)
    second = pipeline.generate(pipe, request, CPU, decode=False)
    assert first.frames.shape == (1, 4, 6, 3) and second.frames is None
    assert torch.equal(first.latents, second.latents)
    assert len(first.seconds_per_step) == 3 and min(first.seconds_per_step) > 0
    assert [call["output_type"] for call in pipe.calls] == ["np", "latent"]
    assert "step" not in vars(pipe.scheduler), "the scheduler is as it was"
    other = pipeline.generate(pipe, pipeline.Request("a", width=6, num_inference_steps=3, seed=2), CPU)
    assert not torch.equal(first.latents, other.latents)


def test_call_arguments():
    pipe = Pipeline()
    asked = pipeline.call_arguments(pipe, pipeline.Request("a", num_inference_steps=3))
    assert asked == {"prompt": "a", "num_inference_steps": 3, "num_frames": 1}
    assert pipeline.call_arguments(pipe, pipeline.Request("a", num_frames=9))["num_frames"] == 9
    with pytest.raises(UnsupportedError, match="takes no guidance_scale, strength"):
        pipeline.call_arguments(pipe, pipeline.Request("a", guidance_scale=2.0, extra={"strength": 1}))


def test_a_pipeline_that_does_not_step_is_refused():
    class Stepless(Pipeline):
        def __call__(self, prompt, num_inference_steps, generator, num_frames, output_type):
            return None

    with pytest.raises(UnsupportedError, match="scheduler"):
        pipeline.generate(Stepless(), pipeline.Request("a"), CPU)
