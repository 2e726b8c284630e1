"""BAGEL's denoiser against itself: cache or none, index tensors or runs."""

import pytest
import torch

from seqpar.models import registry
from seqpar.models.bagel import marker_runs, token_indexes
from seqpar.models.bagel_layers import BagelConfig, IndexPacking, RunPacking
from seqpar.models.randomise import randomise

PROMPT = 7


@pytest.fixture(params=[4, 3])
def model(request):
    family = registry.get("bagel")
    return randomise(family.build(family.tiny_config(heads=request.param)))


def _inputs(model, **size):
    family = registry.get("bagel")
    return family.grid_inputs(family.tiny_config(heads=model.config.heads), **size)


def _cache(model, ids):
    return model.prefill(model.embed_tokens(ids), torch.arange(len(ids)), [len(ids)])


@torch.no_grad()
def test_cached_step_equals_the_whole_sequence_under_its_mask(model):
    inputs = _inputs(model, rows=4, columns=5, text_len=PROMPT)
    ids = torch.arange(PROMPT) * 5 % model.config.vocabulary
    keys, values = _cache(model, ids)
    cached = model(**{**inputs, "past_keys": keys, "past_values": values})
    whole = model.denoise_uncached(ids, inputs["x_t"], inputs["timestep"], inputs["packed_vae_position_ids"], inputs["packed_text_ids"])
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)
    assert (cached - model(**inputs)).abs().max() > 0.1, "the cache must matter"


@torch.no_grad()
def test_prefill_in_two_parts_equals_prefill_at_once(model):
    ids = torch.arange(PROMPT)
    keys, values = _cache(model, ids)
    first = _cache(model, ids[:3])
    second = model.prefill(model.embed_tokens(ids[3:]), torch.arange(3, PROMPT), [PROMPT - 3], past=list(zip(*first, strict=True)), past_lens=[3])
    for whole, parts in ((keys, (first[0], second[0])), (values, (first[1], second[1]))):
        for layer, (one, two) in enumerate(zip(*parts, strict=True)):
            torch.testing.assert_close(torch.cat([one, two]), whole[layer])


@torch.no_grad()
def test_routing_by_index_tensors_equals_routing_by_runs(model):
    inputs = _inputs(model, rows=3, columns=5, batch=2, text_len=PROMPT, pad_text=2)
    markers, latents = token_indexes(inputs["image_lens"])
    indexed = model(**inputs, packed_text_indexes=markers, packed_vae_token_indexes=latents)
    assert torch.equal(indexed, model(**inputs))


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other(model):
    inputs = _inputs(model, rows=3, columns=5, batch=2, text_len=PROMPT)
    alone = _inputs(model, rows=3, columns=5, text_len=PROMPT)
    alone |= {"x_t": inputs["x_t"][:15]}
    alone |= {key: [layer[:PROMPT] for layer in inputs[key]] for key in ("past_keys", "past_values")}
    torch.testing.assert_close(model(**inputs)[:15], model(**alone))


@pytest.mark.parametrize("lens", [[4], [3, 5], [1, 1, 2]])
def test_packings_agree_and_invert(lens):
    runs, indexes = RunPacking(marker_runs(lens)), IndexPacking(*token_indexes(lens))
    und, gen = torch.randn(2 * len(lens), 2), torch.randn(sum(lens), 2)
    packed = runs.merge(und, gen)
    assert torch.equal(packed, indexes.merge(und, gen))
    for packing in (runs, indexes):
        assert all(map(torch.equal, packing.split(packed), (und, gen)))


def test_exports_without_change(model):
    inputs = _inputs(model, rows=3, columns=5, batch=2, text_len=PROMPT, pad_text=2)
    exported = torch.export.export(model, (), inputs, strict=False)
    assert torch.equal(exported.module()(**inputs), model(**inputs))
    targets = [node.target for node in exported.graph.nodes]
    assert torch.ops.aten.scaled_dot_product_attention.default in targets


def test_impossible_head_counts_are_refused():
    with pytest.raises(ValueError, match="kv_heads must divide heads"):
        BagelConfig(width=64, heads=4, kv_heads=3)
