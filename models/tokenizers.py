"""Tiny tokenizers, trained in a fraction of a second on a few sentences: nothing is downloaded."""

import json
import string
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer, T5TokenizerFast

CORPUS = (
    "a cup of coffee on the table",
    "a red bird sits on a green branch in the morning light",
    "an old wooden boat on a calm blue lake, mountains behind it",
    "a small robot paints a picture of a cat",
    "two children fly a kite over a field of yellow flowers",
    "a quiet street at night, rain, neon signs and reflections",
    "portrait of an astronaut with a white helmet, studio photo",
    "a train crosses a high stone bridge above a river",
    "a bowl of fruit with apples, pears and grapes, oil painting",
    "a lighthouse on a cliff, waves, clouds and a stormy sky",
    "a dog runs through fresh snow, slow motion, wide shot",
    "the camera moves slowly around a glass sphere on black sand",
    "a paper lantern floats over water, soft warm light, high detail",
    "a white cat sleeps beside an open book near the window",
    "user assistant system think",
)
# Every printable character alone, so that no ASCII text meets an unknown token.
_ALPHABET = " ".join(string.ascii_letters + string.digits + string.punctuation)
_CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level pairs with start and end tokens; at most 77 tokens, as CLIP has positions for."""
    untrained = CLIPTokenizer()
    raw = Tokenizer(BPE(end_of_word_suffix="</w>"))
    raw.normalizer = untrained.backend_tokenizer.normalizer
    raw.pre_tokenizer = untrained.backend_tokenizer.pre_tokenizer
    # The trainer numbers the word-final letters in an order of its own each time, unless they are there already.
    letters = sorted(ByteLevel.alphabet())
    reserved = [untrained.bos_token, untrained.eos_token, *(letter + "</w>" for letter in letters)]
    trainer = BpeTrainer(vocab_size=4000, special_tokens=reserved, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False)
    raw.train_from_iterator([*CORPUS, _ALPHABET], trainer)
    model = json.loads(raw.to_str())["model"]
    return CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=77)


def t5_tokenizer() -> PreTrainedTokenizerBase:
    """Unigram pieces with an end token and padding token 0; also what UMT5 uses."""
    trained = _train(T5TokenizerFast(extra_ids=0), ())
    pieces = json.loads(trained.backend_tokenizer.to_str())["model"]["vocab"]
    # Training adds scores, and numbers the rarest letters, in no fixed order: coarse scores, sorted again, hide that.
    special, learned = pieces[:3], [(piece, round(score, 2)) for piece, score in pieces[3:]]
    vocab = [*map(tuple, special), *sorted(learned, key=lambda piece: (-piece[1], piece[0]))]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def qwen_tokenizer(texts: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Byte-level pairs with the chat tokens and a chat template.

    Every word of `texts` becomes one token: a pipeline that drops a fixed number of tokens of its own prompt template
    finds as many as the published tokenizer gives it.
    """
    tokenizer = Qwen2Tokenizer(additional_special_tokens=list(_CHAT_TOKENS), model_max_length=16384)
    trained = _train(tokenizer, texts)
    trained.chat_template = _CHAT_TEMPLATE
    return trained


def _train(untrained: PreTrainedTokenizerBase, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    lines = [*CORPUS, *texts, _ALPHABET]
    return untrained.train_new_from_iterator(lines, vocab_size=4000, show_progress=False)
