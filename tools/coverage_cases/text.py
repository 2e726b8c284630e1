"""Language and vision encoders of transformers, and plain torch.nn modules."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.tools.coverage_cases.case import Case, Draw

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER: dict[str, Any] = {**SIZE, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 2048}
VISION: dict[str, Any] = {**SIZE, "image_size": 16, "patch_size": 4, "num_channels": 3}


def transformers_case(name: str, draw: Callable[[Draw], dict[str, Any]], /, config: str, **settings: Any) -> Case:
    """A case of a transformers class with the config class `config`; attention through `attn_implementation`."""

    def construct() -> nn.Module:
        import transformers

        attention = settings.get("attn_implementation", "sdpa")
        built = getattr(transformers, config)(**{k: v for k, v in settings.items() if k not in ("attn_implementation", "module")})
        built._attn_implementation = attention
        module = importlib.import_module(settings.get("module", "transformers"))
        return getattr(module, name.split("@")[0])(built)

    return Case(name, construct, lambda d: {**draw(d), "return_dict": False})


def tokens(d: Draw) -> int:
    return d.pick(16, 15, 1024)


def words(d: Draw) -> dict[str, Any]:
    return {"input_ids": d.integers(50, d.batch, tokens(d)), "use_cache": False}


def padded_words(d: Draw) -> dict[str, Any]:
    return {**words(d), "attention_mask": d.mask(tokens(d), torch.long)}


def with_loss(d: Draw) -> dict[str, Any]:
    return {**padded_words(d), "labels": d.integers(50, d.batch, tokens(d))}


def encoder_words(d: Draw) -> dict[str, Any]:
    return {"input_ids": d.integers(50, d.batch, tokens(d)), "attention_mask": d.mask(tokens(d), torch.long)}


def clip_words(d: Draw) -> dict[str, Any]:
    ids = d.integers(48, d.batch, tokens(d))
    ids[:, -1] = 49
    return {"input_ids": ids, "attention_mask": d.mask(tokens(d), torch.long, padded=0)}


def picture(d: Draw) -> dict[str, Any]:
    """The number of patches is part of the configuration; other sizes interpolate the positions."""
    rows, cols = d.pick((4, 4), (3, 5), (32, 32))
    return {"pixel_values": d.normal(d.batch, 3, 4 * rows, 4 * cols), "interpolate_pos_encoding": True}


def fixed_picture(d: Draw) -> dict[str, Any]:
    """DINOv2 always interpolates its positions."""
    rows, cols = d.pick((4, 4), (3, 5), (32, 32))
    return {"pixel_values": d.normal(d.batch, 3, 4 * rows, 4 * cols)}


def sound(d: Draw) -> dict[str, Any]:
    """Whisper takes exactly twice as many mel frames as it has positions."""
    return {"input_features": d.normal(d.batch, 8, 120)}


class SelfAttention(nn.Module):
    """One `nn.MultiheadAttention` with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x_BSC: Tensor, padding: Tensor | None = None) -> Tensor:
        normed = self.norm(x_BSC)
        return x_BSC + self.attention(normed, normed, normed, key_padding_mask=padding, need_weights=False)[0]


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2, enable_nested_tensor=False)


def sequence(d: Draw) -> Tensor:
    return d.normal(d.batch, tokens(d), 32)


def decoder(d: Draw) -> dict[str, Any]:
    length = tokens(d)
    return {"tgt": sequence(d), "memory": d.words(32), "tgt_mask": torch.full((length, length), float("-inf")).triu(1)}


def t5(**settings: Any) -> dict[str, Any]:
    return {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "is_encoder_decoder": False, "use_cache": False, **settings}


def interfaces(name: str, draw: Callable[[Draw], dict[str, Any]], /, **settings: Any) -> tuple[Case, ...]:
    """One case per attention interface of transformers: `sdpa`, `eager` (products and a softmax), `flex_attention`."""
    others = {"eager": "eager", "flex": "flex_attention"}
    return (transformers_case(name, draw, **settings), *(transformers_case(f"{name}@{label}", draw, attn_implementation=kind, **settings) for label, kind in others.items()))


GEMMA: dict[str, Any] = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], **DECODER}

CASES: tuple[Case, ...] = (
    *interfaces("LlamaForCausalLM", padded_words, config="LlamaConfig", **DECODER),
    transformers_case("LlamaForCausalLM@loss", with_loss, config="LlamaConfig", **DECODER),
    transformers_case("LlamaForCausalLM@causal", words, config="LlamaConfig", **DECODER),
    *interfaces("Qwen3ForCausalLM", padded_words, config="Qwen3Config", head_dim=8, **DECODER),
    *interfaces("MistralForCausalLM", padded_words, config="MistralConfig", sliding_window=6, head_dim=8, **DECODER),
    *interfaces("Gemma3ForCausalLM", padded_words, config="Gemma3TextConfig", **GEMMA),
    transformers_case("Gemma3ForCausalLM@loss", with_loss, config="Gemma3TextConfig", **GEMMA),
    transformers_case("MixtralForCausalLM", padded_words, config="MixtralConfig", num_local_experts=3, num_experts_per_tok=2, head_dim=8, **DECODER),
    transformers_case("Qwen3MoeForCausalLM", padded_words, config="Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, **DECODER),
    transformers_case("T5EncoderModel", encoder_words, config="T5Config", **t5()),
    transformers_case("UMT5EncoderModel", encoder_words, config="UMT5Config", **t5()),
    transformers_case("CLIPTextModel", clip_words, config="CLIPTextConfig", vocab_size=50, eos_token_id=49, max_position_embeddings=1024, **SIZE),
    transformers_case("CLIPVisionModel", picture, config="CLIPVisionConfig", **VISION),
    transformers_case("SiglipVisionModel", picture, config="SiglipVisionConfig", **VISION),
    transformers_case("Dinov2Model", fixed_picture, config="Dinov2Config", mlp_ratio=2, **{k: v for k, v in VISION.items() if k != "intermediate_size"}),
    transformers_case("WhisperEncoder", sound, config="WhisperConfig", module="transformers.models.whisper.modeling_whisper", d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=8, max_source_positions=60, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    Case("torch.nn.MultiheadAttention", SelfAttention, lambda d: {"x_BSC": sequence(d)}),
    Case("torch.nn.MultiheadAttention@padding", SelfAttention, lambda d: {"x_BSC": sequence(d), "padding": ~d.mask(tokens(d))}),
    Case("torch.nn.TransformerEncoder", encoder, lambda d: {"src": sequence(d)}),
    Case("torch.nn.TransformerEncoder@padding", encoder, lambda d: {"src": sequence(d), "src_key_padding_mask": ~d.mask(tokens(d))}),
    Case("torch.nn.TransformerEncoder@causal", encoder, lambda d: {"src": sequence(d), "mask": torch.full((tokens(d),) * 2, float("-inf")).triu(1), "is_causal": True}),
    Case("torch.nn.TransformerDecoder", lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, 0.0, batch_first=True), 2), decoder),
)
