"""Tiny text encoders with random weights, of the classes the pipelines expect."""

from typing import Any

from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from seqpar.models.randomise import randomise


def clip_encoder(tokenizer: PreTrainedTokenizerBase, width: int, seed: int) -> nn.Module:
    """Its pooled output [batch, width] is read at the first end token."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return randomise(CLIPTextModel(config), seed)


def t5_encoder(tokenizer: PreTrainedTokenizerBase, width: int, seed: int) -> nn.Module:
    """Last hidden states [batch, tokens, width]."""
    return randomise(T5EncoderModel(T5Config(**_t5_sizes(tokenizer, width))), seed)


def umt5_encoder(tokenizer: PreTrainedTokenizerBase, width: int, seed: int) -> nn.Module:
    """Last hidden states [batch, tokens, width]."""
    return randomise(UMT5EncoderModel(UMT5Config(**_t5_sizes(tokenizer, width))), seed)


def qwen3_encoder(tokenizer: PreTrainedTokenizerBase, width: int, seed: int) -> nn.Module:
    """Hidden states [batch, tokens, width]; the last but one is the one read."""
    config = Qwen3Config(**_qwen_sizes(tokenizer, width), head_dim=width // 4)
    return randomise(Qwen3Model(config), seed)


def qwen_vl_encoder(tokenizer: PreTrainedTokenizerBase, width: int, seed: int) -> nn.Module:
    """Hidden states [batch, tokens, width]. As a generator it stops within a few tokens, which keeps prompt rewriting short."""
    config = Qwen2_5_VLConfig(
        text_config={
            **_qwen_sizes(tokenizer, width),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1_000_000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        # Pictures are never given, so their tokens may be ones that no text contains.
        image_token_id=len(tokenizer),
        video_token_id=len(tokenizer) + 1,
        vision_start_token_id=len(tokenizer) + 2,
        vision_end_token_id=len(tokenizer) + 3,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 3))
    return randomise(model, seed)


def _t5_sizes(tokenizer: PreTrainedTokenizerBase, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": width // 4,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _qwen_sizes(tokenizer: PreTrainedTokenizerBase, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + 4,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.pad_token_id,
    }
