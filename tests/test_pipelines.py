"""`seqpar.parallelize` on real diffusers pipelines of tiny components: two ranks against the pipeline itself."""

import numpy as np
import pytest
import torch

SIZE = {"width": 32, "height": 32, "num_inference_steps": 1, "max_sequence_length": 8, "output_type": "np"}
TOLERANCE = 1e-4


def quiet_pipeline(name):
    from diffusers.utils import logging

    from seqpar.models.checkpoints import build_pipeline

    logging.set_verbosity_error()
    pipe = build_pipeline(name, heads=2, layers=1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed=0):
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def mask():
    return torch.nn.functional.pad(torch.ones(1, 1, 16, 32), (0, 0, 0, 16))


def alone_and_parallel(pipe, arguments, **degrees):
    """The picture of the pipeline itself and of the parallel one, with what was compiled."""
    import seqpar

    def draw():
        return np.asarray(pipe("a cup", generator=torch.Generator().manual_seed(3), **SIZE | arguments)[0])

    alone = draw()
    with seqpar.parallelize(pipe, **degrees) as handle:
        parallel = draw()
        compiled = {name: [plan.sharded_flop_fraction for plan in (p.plan for p in d.programs)] for name, d in handle.denoisers.items()}
    assert np.array_equal(draw(), alone), "undone"
    return alone, parallel, compiled


def check(results, denoisers):
    first = results[0][1]
    for alone, parallel, compiled in results:
        assert alone.std() > 0.02, "not constant"
        assert np.abs(parallel - alone).max() < TOLERANCE
        assert np.array_equal(parallel, first)
        assert compiled.keys() == set(denoisers)
        assert all(fraction > 0.3 for fractions in compiled.values() for fraction in fractions)


def flux_on_rank():
    from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline

    from seqpar.models import registry
    from seqpar.models.randomise import randomise

    pipe = quiet_pipeline("flux")
    parts = pipe.components
    config = {k: v for k, v in registry.get("flux").tiny_config(heads=2, layers=1).items()}
    controlnet = randomise(FluxControlNetModel(**config), 5).eval()
    edit = {"image": picture(), "strength": 1.0}
    runs = {
        "text": (pipe, {}),
        "img2img": (FluxImg2ImgPipeline(**parts), edit),
        "inpaint": (FluxInpaintPipeline(**parts), edit | {"mask_image": mask()}),
        "controlnet": (FluxControlNetPipeline(**parts, controlnet=controlnet), {"control_image": picture(1)}),
    }
    for each, _ in runs.values():
        each.set_progress_bar_config(disable=True)
    return {name: alone_and_parallel(each, arguments, ulysses=2) for name, (each, arguments) in runs.items()}


@pytest.fixture(scope="module")
def flux(two_ranks):
    return two_ranks.run(flux_on_rank)


@pytest.mark.parametrize("name", ["text", "img2img", "inpaint", "controlnet"])
def test_flux(flux, name):
    check([rank[name] for rank in flux], ["transformer", "controlnet"] if name == "controlnet" else ["transformer"])
