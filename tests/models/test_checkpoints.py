"""Tiny pipelines: they load, draw, listen to the prompt, and call their transformer as the families' inputs do."""

import functools
import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from seqpar.errors import SeqparError
from seqpar.models import registry, tokenizers
from seqpar.models.checkpoints import build_checkpoint, checkpoint_names

WIDTH, HEIGHT, FRAMES = 96, 64, 5
# LongCat-Image lets its text encoder rewrite the prompt first, which a random one does badly.
EXTRA = {"longcat-image": {"enable_prompt_rewrite": False}, "wan": {"num_frames": FRAMES}, "wan-ti2v": {"num_frames": FRAMES}}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """name -> pipeline, each built and loaded once."""
    logging.set_verbosity_error()

    @functools.cache
    def load(name):
        folder = build_checkpoint(name, tmp_path_factory.mktemp(name), heads=3)
        assert (folder / "model_index.json").is_file()
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def _draw(name, pipeline, prompt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = {"width": WIDTH, "height": HEIGHT, "num_inference_steps": 3, "output_type": "np"}
    return np.asarray(pipeline(prompt, generator=generator, **size, **EXTRA.get(name, {}))[0])


@pytest.mark.parametrize("name", checkpoint_names())
def test_pipeline_draws_a_picture_that_depends_on_prompt_and_seed(name, load):
    pipeline = load(name)
    picture = _draw(name, pipeline, "a cup of coffee on the table")
    assert picture.shape[-3:] == (HEIGHT, WIDTH, 3)
    assert picture.std() > 0.05 and ((picture > 0) & (picture < 1)).mean() > 0.5
    assert np.array_equal(picture, _draw(name, pipeline, "a cup of coffee on the table"))
    assert np.abs(picture - _draw(name, pipeline, "a red bird!")).mean() > 1e-3
    assert np.abs(picture - _draw(name, pipeline, "a cup of coffee on the table", seed=1)).mean() > 1e-2


@pytest.mark.parametrize("name", checkpoint_names())
def test_example_inputs_look_like_the_pipelines_own_call(name, load, monkeypatch):
    pipeline = load(name)
    calls, forward = [], pipeline.transformer.forward
    signature = inspect.signature(forward)

    def record(*args, **kwargs):
        calls.append(dict(signature.bind(*args, **kwargs).arguments))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "forward", record)
    _draw(name, pipeline, "a small robot")
    family, seen = registry.get(name), calls[0]
    config = {**family.tiny, **pipeline.transformer.config}
    texts = [len(text) for text in seen.get("cap_feats", seen.get("encoder_hidden_states"))]
    frames = FRAMES if family.frames_per_token > 1 else 1
    batch = len(seen["x"]) if "x" in seen else len(seen["hidden_states"])
    ours = family.example_inputs(config, height=HEIGHT, width=WIDTH, frames=frames, batch=batch, text_len=texts[0], pad_text=texts[0] - texts[-1])
    assert _form(seen) == _form(ours)


def _form(inputs):
    """Structure, shapes and dtypes; values of what is no tensor."""
    if isinstance(inputs, torch.Tensor):
        return tuple(inputs.shape), inputs.dtype
    if isinstance(inputs, dict):
        return {key: _form(value) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return [_form(value) for value in inputs]
    return inputs


def test_prompt_template_is_dropped_whole(load):
    pipeline = load("qwen-image")
    before, _ = pipeline.prompt_template_encode.split("{}")
    assert len(pipeline.tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx


def test_prompt_rewriting_ends_soon(load):
    pipeline = load("longcat-image")
    assert len(pipeline.tokenizer(pipeline.rewire_prompt("a robot", "cpu")[0]).input_ids) < 100


def test_heads_and_seed_are_honoured(tmp_path):
    one, other = (build_checkpoint("flux", tmp_path / str(seed), heads=6, layers=1, seed=seed) for seed in (0, 1))
    first, second = (DiffusionPipeline.from_pretrained(folder).transformer for folder in (one, other))
    assert first.config.num_attention_heads == 6 and len(first.transformer_blocks) == 1
    assert not torch.equal(first.proj_out.weight, second.proj_out.weight)


def test_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(SeqparError, match="known: flux, qwen-image"):
        build_checkpoint("fluxx", tmp_path)


@pytest.mark.parametrize("make", [tokenizers.clip_tokenizer, tokenizers.t5_tokenizer, tokenizers.qwen_tokenizer])
def test_tokenizers_know_all_of_ascii(make):
    tokenizer = make()
    text = "Zebra, 7 (quick) jackdaws; vow? #1 ~ @home & {more} 50% \"x\" | y_z \\ ^ ` <k> = $5 * !"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    squeeze = str.maketrans("", "", " ")
    assert tokenizer.decode(ids).translate(squeeze).lower() == text.translate(squeeze).lower()


def test_training_tokenizers_is_reproducible():
    """In another process too: hash seeds differ there."""
    makers = ("clip_tokenizer", "t5_tokenizer", "qwen_tokenizer")
    program = f"from seqpar.models import tokenizers as t; print(*(getattr(t, m)().backend_tokenizer.to_str() for m in {makers}), sep='')"
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert elsewhere.strip() == "".join(getattr(tokenizers, maker)().backend_tokenizer.to_str() for maker in makers)
