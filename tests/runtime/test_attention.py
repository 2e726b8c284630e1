import math

import pytest
import torch
import torch.nn.functional as F

from seqpar.runtime.attention import attend, causal_mask, merge, nothing_seen, select_heads

B, H, SQ, SK, D = 2, 4, 5, 7, 8


def qkv(key_heads=H, dtype=torch.float32, value_dim=D):
    q, k = torch.randn(B, H, SQ, D), torch.randn(B, key_heads, SK, D)
    return [x.to(dtype) for x in (q, k, torch.randn(B, key_heads, SK, value_dim))]


def masks():
    padding = torch.rand(B, 1, 1, SK) > 0.4
    padding[:, :, :, 0] = True
    blind = torch.rand(1, H, SQ, SK) > 0.3
    blind[:, 1, 2] = False
    additive = torch.randn(1, H, SQ, SK)
    dark = additive.masked_fill(~blind, -math.inf)
    return {
        "none": None,
        "padding": padding,
        "plain 2-D": torch.ones(SQ, SK, dtype=torch.bool).tril(),
        "blind row": blind,
        "additive": additive,
        "additive blind row": dark,
        "very negative": torch.zeros(B, 1, SQ, SK).masked_fill(~padding, torch.finfo(torch.float32).min),
        "one per query": torch.randn(1, 1, SQ, 1),
        "all dark": torch.zeros(1, 1, 1, SK, dtype=torch.bool),
    }


def reference(q, k, v, mask, scale=None):
    """float64, and a row without keys is 0."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    lse = scores.logsumexp(-1)
    return scores.softmax(-1).nan_to_num(0.0) @ v, lse


def close(a, b, tolerance=1e-5):
    return (a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-12


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("value_dim", [D, 3])  # another value dim: no fused kernel takes it
def test_attend(name, key_heads, value_dim):
    torch.manual_seed(0)
    mask = masks()[name]
    q, k, v = qkv(key_heads, value_dim=value_dim)
    out, lse = attend(q, k, v, mask, enable_gqa=key_heads < H)
    expected, expected_lse = reference(q, k, v, mask)
    assert close(out, expected)
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-5, atol=1e-5) and lse.dtype == torch.float32
    if name == "all dark":
        assert torch.all(out == 0) and torch.all(lse == -math.inf)


@pytest.mark.parametrize("value_dim", [D, 3])
def test_causal_and_scale(value_dim):
    q, k, v = qkv(value_dim=value_dim)
    out, lse = attend(q, k, v, scale=0.3, is_causal=True)
    expected, expected_lse = reference(q, k, v, torch.ones(SQ, SK, dtype=torch.bool).tril(), 0.3)
    assert close(out, expected) and close(lse, expected_lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["none", "padding", "additive"])
def test_dtypes(dtype, name):
    q, k, v = qkv(dtype=dtype)
    mask = masks()[name]
    out, lse = attend(q, k, v, mask)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert close(out, reference(q, k, v, mask)[0], 2e-2)


def test_alone_it_is_the_attention_of_torch_bit_for_bit():
    q, k, v = qkv()
    assert torch.equal(attend(q, k, v)[0], F.scaled_dot_product_attention(q, k, v))


def test_strides_the_kernels_do_not_check():
    q, k, v = (x.mT.contiguous().mT for x in qkv())
    assert close(attend(q, k, v)[0], reference(q, k, v, None)[0])


def test_nothing_to_see():
    q, k, v = qkv()
    for a, b in ((q[:, :, :0], k), (q, k[:, :, :0]), (q[:, :, :0], k[:, :, :0])):
        out, lse = attend(a, b, v[:, :, : b.shape[2]])
        assert out.shape == a.shape and torch.all(out == 0) and torch.all(lse == -math.inf)


@pytest.mark.parametrize("name", ["none", "blind row", "all dark"])
@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_merge_of_two_parts_is_the_whole(name, cut):
    mask = masks()[name]
    q, k, v = qkv()
    parts = []
    for keys in (slice(0, cut), slice(cut, None)):
        part = None if mask is None else mask[..., keys]
        parts.append(attend(q, k[:, :, keys], v[:, :, keys], part))
    out, lse = merge(*parts[0], *parts[1])
    expected, expected_lse = reference(q, k, v, mask)
    assert close(out, expected) and torch.allclose(lse.double(), expected_lse, atol=1e-5)


def test_merge_widens_and_takes_nothing_from_nothing():
    q, k, v = qkv(dtype=torch.bfloat16)
    seen, unseen = attend(q, k, v), nothing_seen(q, v)
    for out, lse in (merge(*seen, *unseen), merge(*unseen, *seen)):
        assert out.dtype == torch.float32 and torch.equal(out, seen[0].float()) and torch.equal(lse, seen[1])


def test_meta_gives_shapes():
    q, k, v = (x.to("meta") for x in qkv(2))
    assert attend(q.double(), k.double(), v.double(), enable_gqa=True)[1].dtype == torch.float64
    for mask in masks().values():
        out, lse = attend(q, k, v, None if mask is None else mask.to("meta"), enable_gqa=True)
        assert out.shape == (B, H, SQ, D) and lse.shape == (B, H, SQ) and out.device.type == "meta"


@pytest.mark.parametrize("name", ["none", "padding", "additive blind row"])
def test_compiles_without_a_break(name):
    q, k, v = qkv()
    mask = masks()[name]
    out, lse = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v, mask)
    expected, expected_lse = attend(q, k, v, mask)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_causal_mask_follows_global_positions():
    mask = causal_mask([(0, 1), (4, 2)], [(1, 2), (5, 2)], "cpu")
    assert mask.tolist() == [[False] * 4, [True, True, False, False], [True, True, True, False]]


def test_select_heads():
    x = torch.randn(1, 4, 2, 3)
    assert torch.equal(select_heads(x, (1, 1, 2)), x[:, [1, 1, 2]])
    assert select_heads(x, (2, 3)).data_ptr() == x[:, 2:].data_ptr()


def test_wrong_calls():
    q, k, v = qkv(2)
    with pytest.raises(AssertionError, match="enable_gqa"):
        attend(q, k, v)
    with pytest.raises(AssertionError, match="exclude"):
        attend(*qkv(), torch.ones(SQ, SK), is_causal=True)
