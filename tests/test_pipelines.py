"""`seqpar.parallelize` on real diffusers pipelines of tiny components: two ranks against the pipeline itself."""

import functools
import inspect
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers.utils import logging

import seqpar
from seqpar.compile import sp_compile
from seqpar.denoiser import structure_of
from seqpar.errors import DisagreementError, MeshError, UnsupportedError
from seqpar.models import registry
from seqpar.models.checkpoints import build_pipeline
from seqpar.models.randomise import randomise
from seqpar.tools.pages import blocks_of, run_blocks

SIZE = {"width": 48, "height": 32, "num_inference_steps": 1, "max_sequence_length": 8, "output_type": "np"}
TOLERANCE = 1e-4


def tiny(name):
    logging.set_verbosity_error()
    return without_bar(build_pipeline(name, heads=2, layers=1))


def without_bar(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed=0):
    return torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def mask():
    return torch.nn.functional.pad(torch.ones(1, 1, 16, 48), (0, 0, 0, 16))


def draw(pipe, arguments, seed=3, prompt="a cup"):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return np.asarray(pipe(prompt, generator=generator, **SIZE | arguments)[0])


def compiling_once():
    """Pipelines that share a model and call it alike share its program: compiling is most of what these tests cost."""
    known = {}

    def compile_or_recall(model, inputs, **options):
        key = (id(model), structure_of(inputs))
        known[key] = known.get(key) or sp_compile(model, inputs, **options)
        return known[key]

    return mock.patch("seqpar.pipelines.sp_compile", compile_or_recall)


def run_on_rank(pipe, arguments, **degrees):
    """The picture of the pipeline itself and of the parallel one (every rank has another seed), and what was compiled."""
    alone = draw(pipe, arguments)
    with seqpar.parallelize(pipe, dynamic=False, **degrees) as handle:
        parallel = draw(pipe, arguments, seed=3 + dist.get_rank())
        compiled = {name: [program.plan.sharded_flop_fraction for program in d.programs] for name, d in handle.denoisers.items()}
    return alone, parallel, compiled


def check(results, *denoisers):
    for alone, parallel, compiled in results:
        assert alone.std() > 0.02, "not constant"
        assert np.abs(parallel - alone).max() < TOLERANCE
        assert np.array_equal(parallel, results[0][1])
        assert compiled.keys() == set(denoisers)
        assert all(fraction > 0.3 for fractions in compiled.values() for fraction in fractions)


class Combined:
    """A pipeline made of another one, as a prior and a decoder are made one."""

    def __init__(self, inner):
        self.inner = inner

    components = property(lambda self: {"denoiser": self.inner.transformer})

    def progress_bar(self, total):
        return self.inner.progress_bar(total=total)

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


# ---- Flux


def flux_on_rank():
    from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline

    pipe = tiny("flux")
    parts = pipe.components
    controlnet = randomise(FluxControlNetModel(**registry.get("flux").tiny_config(heads=2, layers=1)), 5).eval()
    edit = {"image": picture(), "strength": 1.0}
    runs = {
        "img2img": (FluxImg2ImgPipeline(**parts), edit),
        "inpaint": (FluxInpaintPipeline(**parts), edit | {"mask_image": mask()}),
        "controlnet": (FluxControlNetPipeline(**parts, controlnet=controlnet), {"control_image": picture(1)}),
    }
    with compiling_once():
        results = {name: run_on_rank(without_bar(each), arguments, ulysses=2) for name, (each, arguments) in runs.items()}
        results["combined"] = run_on_rank(Combined(pipe), {}, ulysses=2)
        return results | random_numbers_on_rank(pipe)


def random_numbers_on_rank(pipe):
    """The default generators of the ranks differ; then the prompts do."""
    torch.manual_seed(7)
    alone = draw(pipe, {}, seed=None)
    with seqpar.parallelize(pipe, ulysses=2, dynamic=False) as handle:
        torch.manual_seed(7 + dist.get_rank())
        parallel = draw(pipe, {}, seed=None)
        next_number = torch.rand(1).item()
        compiled = {name: [plan.sharded_flop_fraction for plan in handle.plans] for name in handle.denoisers}
        try:
            draw(pipe, {}, prompt=["a cup", "something else entirely"][dist.get_rank()])
            error = None
        except DisagreementError as caught:
            error = str(caught)
        explained = handle.explain()
    torch.manual_seed(7 + dist.get_rank())
    return {"text": (alone, parallel, compiled), "numbers": (next_number, torch.rand(1).item()), "error": error, "explained": explained}


@pytest.fixture(scope="module")
def flux(two_ranks):
    return two_ranks.run(flux_on_rank)


@pytest.mark.parametrize("name", ["text", "img2img", "inpaint", "controlnet"])
def test_flux(flux, name):
    check([rank[name] for rank in flux], "transformer", *(["controlnet"] if name == "controlnet" else []))


def test_a_pipeline_that_holds_another(flux):
    check([rank["combined"] for rank in flux], "denoiser")


def test_random_numbers_are_the_first_ranks_and_the_others_keep_theirs(flux):
    first, second = (rank["numbers"] for rank in flux)
    assert first[0] != first[1], "the first rank drew latents"
    assert second[0] == second[1], "the second rank's own generator stands where it did"


def test_different_prompts_are_an_error_on_every_rank(flux):
    assert all("asked for different things" in rank["error"] and ("encoder_hidden_states" in rank["error"] or "pooled" in rank["error"]) for rank in flux)
    assert all("transformer (FluxTransformer2DModel)" in rank["explained"] and "ulysses 2" in rank["explained"] for rank in flux)


# ---- Qwen-Image and Wan


def qwen_on_rank():
    from diffusers import QwenImageControlNetModel, QwenImageControlNetPipeline, QwenImageImg2ImgPipeline, QwenImageInpaintPipeline

    pipe = tiny("qwen-image")
    parts = pipe.components
    controlnet = randomise(QwenImageControlNetModel(**registry.get("qwen-image").tiny_config(heads=2, layers=1)), 5).eval()
    edit = {"image": picture(), "strength": 1.0}
    runs = {
        "img2img": (QwenImageImg2ImgPipeline(**parts), edit),
        "inpaint": (QwenImageInpaintPipeline(**parts), edit | {"mask_image": mask()}),
        "controlnet": (QwenImageControlNetPipeline(**parts, controlnet=controlnet), {"control_image": picture(1)}),
    }
    with compiling_once():
        return {name: run_on_rank(without_bar(each), arguments, ring=2) for name, (each, arguments) in runs.items()}


@pytest.fixture(scope="module")
def qwen(two_ranks):
    return two_ranks.run(qwen_on_rank)


@pytest.mark.parametrize("name", ["img2img", "inpaint", "controlnet"])
def test_qwen_image(qwen, name):
    check([rank[name] for rank in qwen], "transformer", *(["controlnet"] if name == "controlnet" else []))


def wan_on_rank():
    pipe = tiny("wan")
    # At a step count of two, the first belongs to one transformer and the second to the other; guidance calls each twice.
    return run_on_rank(pipe, {"num_frames": 5, "num_inference_steps": 2}, ring=2)


def test_wan_with_two_transformers(two_ranks):
    results = two_ranks.run(wan_on_rank)
    check(results, "transformer", "transformer_2")
    assert all(len(fractions) == 1 for fractions in results[0][2].values()), "guidance and no guidance are one program"


# ---- what docs/pipelines.md shows


def run_documented(page, folder):
    with compiling_once():
        return np.asarray(run_blocks(page, folder, file=f"rank{dist.get_rank()}.py")["image"])


def test_documented_blocks_run(two_ranks, tmp_path):
    page = Path(__file__).parents[1] / "docs" / "pipelines.md"
    assert len(blocks_of(page)) == 3
    first, second = two_ranks.run(run_documented, page, tmp_path)
    assert first.std() > 1 and np.array_equal(first, second)


# ---- in one process


@pytest.fixture(scope="module")
def flux_pipe():
    return tiny("flux")


@pytest.fixture
def pipe(flux_pipe, monkeypatch):
    """A Flux pipeline for which "compiling" is noting the call."""
    calls = []

    def compile_noted(model, inputs, **options):
        calls.append((model, inputs, options))
        return model

    monkeypatch.setattr("seqpar.pipelines.sp_compile", compile_noted)
    flux_pipe.noted = calls
    yield flux_pipe
    if hasattr(flux_pipe, "unparallelize"):
        flux_pipe.unparallelize()


def test_only_what_is_called_in_the_loop_is_touched_and_only_during_calls(pipe):
    kind, parts = type(pipe), dict(pipe.components)
    alone = draw(pipe, {"num_inference_steps": 2})
    handle = seqpar.parallelize(pipe, backend="inductor")
    assert handle.pipe is pipe and isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
    assert inspect.signature(pipe.__call__) == inspect.signature(functools.partial(kind.__call__, pipe))
    assert np.array_equal(draw(pipe, {"num_inference_steps": 2}), alone)
    ((model, inputs, options),) = pipe.noted
    assert model is pipe.transformer and {"hidden_states", "encoder_hidden_states", "guidance"} <= inputs.keys()
    assert options == {"ulysses": 1, "ring": 1, "mesh": None, "dynamic": None, "backend": "inductor", "comm_dtype": None, "hardware": None}
    assert list(handle.denoisers) == ["transformer"]
    assert all(pipe.components[name] is part for name, part in parts.items())
    assert not any("forward" in vars(part) for part in parts.values() if isinstance(part, torch.nn.Module))
    pipe.unparallelize()
    assert type(pipe) is kind and not handle.denoisers
    handle.unparallelize()  # harmless
    assert np.array_equal(draw(pipe, {"num_inference_steps": 2}), alone) and len(pipe.noted) == 1


def test_only_the_first_rank_draws_its_bar(pipe, monkeypatch, capsys):
    pipe.set_progress_bar_config(disable=False)
    seqpar.parallelize(pipe)
    draw(pipe, {})
    assert "1/1" in capsys.readouterr().err
    monkeypatch.setattr("seqpar.denoising_loops.is_first_rank", lambda: False)
    draw(pipe, {})
    assert capsys.readouterr().err == "" and pipe._progress_bar_config == {"disable": False}
    without_bar(pipe)


def test_a_pipeline_made_from_a_parallel_one_is_not_parallel(pipe):
    from diffusers import FluxImg2ImgPipeline

    seqpar.parallelize(pipe)
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    assert type(other) is FluxImg2ImgPipeline and other.transformer is pipe.transformer
    draw(without_bar(other), {"image": picture(), "strength": 1.0})
    assert not pipe.noted
    seqpar.parallelize(other)
    draw(other, {"image": picture(), "strength": 1.0})
    assert len(pipe.noted) == 1


def test_it_is_undone_after_an_error_in_a_call(pipe):
    def interrupt(*_):
        raise KeyError("from a callback")

    handle = seqpar.parallelize(pipe)
    with pytest.raises(KeyError):
        draw(pipe, {"callback_on_step_end": interrupt})
    assert not any("forward" in vars(part) for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    draw(pipe, {})
    assert len(pipe.noted) == 1 and list(handle.denoisers) == ["transformer"]


def test_a_component_put_in_later_is_found(pipe):
    seqpar.parallelize(pipe)
    before = draw(pipe, {})
    other = registry.get("flux").build(registry.get("flux").tiny_config(heads=2, layers=1))
    first, pipe.transformer = pipe.transformer, randomise(other, 9)
    assert not np.allclose(draw(pipe, {}), before)
    assert [model for model, *_ in pipe.noted] == [first, other]
    pipe.transformer = first


def test_whole_model_offload_is_fine_and_partial_offload_refused(pipe):
    accelerate = pytest.importorskip("accelerate")
    alone = draw(pipe, {})
    hooked = []

    class Note(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            hooked.append(module)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(pipe.transformer, Note())
    seqpar.parallelize(pipe)
    assert np.array_equal(draw(pipe, {}), alone) and hooked == [pipe.transformer] and len(pipe.noted) == 1
    accelerate.hooks.add_hook_to_module(pipe.transformer.x_embedder, Note())
    seqpar.unparallelize(pipe)
    seqpar.parallelize(pipe)
    with pytest.raises(UnsupportedError, match="x_embedder"):
        draw(pipe, {})
    accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True)


def test_a_compiled_denoiser_is_refused(pipe):
    seqpar.parallelize(pipe)
    original = pipe.transformer
    pipe.transformer = torch.compile(original, backend="eager")
    with pytest.raises(UnsupportedError, match='transformer was given to torch.compile.*backend="inductor"'):
        draw(pipe, {})
    pipe.transformer = original
    original.compile(backend="eager")
    with pytest.raises(UnsupportedError, match="torch.compile"):
        draw(pipe, {})
    original._compiled_call_impl = None


def making(pipe, components=None):
    """A pipeline of `pipe`'s components that makes the one that draws when it is called."""

    class Making(type(pipe)):
        def __call__(self, *args, **kwargs):
            return without_bar(type(pipe)(**(components or self.components)))(*args, **kwargs)

    return Making(**pipe.components)


def test_a_pipeline_that_makes_another_when_it_is_called(pipe):
    from diffusers import DiffusionPipeline

    alone, plain = draw(pipe, {}), vars(DiffusionPipeline)["progress_bar"]
    outer = making(pipe)
    with seqpar.parallelize(outer) as handle:
        assert np.array_equal(draw(outer, {}), alone)
        assert list(handle.denoisers) == ["transformer"] and len(pipe.noted) == 1
    assert vars(DiffusionPipeline)["progress_bar"] is plain


def draw_modular(pipe):
    return pipe(prompt="a cup", height=64, width=64, num_inference_steps=2, output_type="np", output="images", generator=torch.Generator().manual_seed(3))


def test_a_modular_pipeline(pipe):
    from diffusers.modular_pipelines import FluxAutoBlocks
    from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks

    plain = vars(LoopSequentialPipelineBlocks)["progress_bar"]
    modular = FluxAutoBlocks().init_pipeline()
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer", "vae", "scheduler")
    modular.update_components(**{name: pipe.components[name] for name in names})
    alone = draw_modular(modular)
    with seqpar.parallelize(modular) as handle:
        assert np.array_equal(draw_modular(modular), alone)
        assert list(handle.denoisers) == ["transformer"] and len(pipe.noted) == 1
    assert not hasattr(modular, "unparallelize") and vars(LoopSequentialPipelineBlocks)["progress_bar"] is plain


def test_nothing_found_is_a_warning(pipe):
    other = registry.get("flux").build(registry.get("flux").tiny_config(heads=2, layers=1))
    outer = making(pipe, {**pipe.components, "transformer": randomise(other, 9)})
    with seqpar.parallelize(outer), pytest.warns(UserWarning, match="nothing ran in parallel.*parallelize those"):
        draw(outer, {})
    assert not pipe.noted


def test_what_cannot_be_parallelised_is_refused(pipe):
    with pytest.raises(UnsupportedError, match="is not a diffusers pipeline.*sp_compile"):
        seqpar.parallelize(pipe.transformer)
    with pytest.raises(UnsupportedError, match="is not parallelised"):
        seqpar.unparallelize(pipe)
    seqpar.parallelize(pipe)
    with pytest.raises(UnsupportedError, match="parallelised already"):
        seqpar.parallelize(pipe)
    seqpar.unparallelize(pipe)
    with pytest.raises(MeshError, match="torchrun --nproc-per-node 2"):
        seqpar.parallelize(pipe, ulysses=2)
    with pytest.raises(MeshError, match="ring"):
        seqpar.parallelize(pipe, ring=0)
    assert not hasattr(pipe, "unparallelize")
