"""Tokenizers of the kinds that real models have, built here, with the control tokens of the templates.

The templates in `tests/data/chat_templates` are written with these tokens, each in the way of one family.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tessera.chat.tokenizer import load_tokenizer
from tessera.defaults import BUNDLED_MODEL

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parents[2] / "data" / "chat_templates").glob("*.jinja"))
}
SPECIAL = (
    "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|channel|>", "<|message|>",
    "<|return|>", "[INST]", "[/INST]", "<|developer|>",
)  # fmt: skip
NOT_SPECIAL = ("<think>", "</think>", "<turn>", "</turn>")

_CORPUS = [
    "The nose is an organ of smell, and a consul is an office.",
    "def define(nose):\n    return nose\n\n    # two  spaces,\ttab",
    "<think> hm </think> system user assistant end think turn model",
    "Straße, naïve, 東京 and emoji \U0001f642 are encoded byte by byte.",
] * 20


def byte_level() -> Tokenizer:
    """The tokenizer of the bundled model: byte-level BPE."""
    return load_tokenizer(BUNDLED_MODEL).backend_tokenizer  # type: ignore[no-any-return]


def metaspace_first() -> Tokenizer:
    """Byte fallback, a space before the first word of a text only: newer conversions of SentencePiece."""
    return _sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def metaspace_always() -> Tokenizer:
    """Byte fallback, a space before the first word of every piece between added tokens."""
    return _sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False))


def prepending() -> Tokenizer:
    """Byte fallback, where the normalizer puts the space: the older conversions (Llama 2, Phi-3)."""
    steps = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _sentencepiece(steps, None)


def no_prefix() -> Tokenizer:
    """Byte fallback that adds no space (Gemma)."""
    return _sentencepiece(normalizers.Replace(" ", "▁"), None)


def unigram() -> Tokenizer:
    """A unigram model that has its control tokens among its own pieces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)],
    )  # fmt: skip
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def folding() -> Tokenizer:
    """A unigram model that has its control tokens among its pieces, after a normalizer that can make them:
    `\uff1c|end|\uff1e` becomes `<|end|>`."""
    tokenizer = unigram()
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def lower_words() -> Tokenizer:
    """Whole words in lower case, control tokens among them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", *SPECIAL])
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _reflagged(tokenizer: Tokenizer, **flags: bool) -> Tokenizer:
    """Change the flags of all added tokens."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [{**token, **flags} for token in content["added_tokens"]]
    return Tokenizer.from_str(json.dumps(content))


def normalized_tokens() -> Tokenizer:
    """Finds its control tokens in normalised text, so `<|END|>` is one too."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    return _reflagged(tokenizer, normalized=True)


def greedy_tokens() -> Tokenizer:
    """Its control tokens absorb the white space around them."""
    return _reflagged(byte_level(), lstrip=True, rstrip=True)


def standing_tokens() -> Tokenizer:
    """Its control tokens are not recognised beside a letter."""
    return _reflagged(byte_level(), single_word=True)


def with_bos_and_eos() -> Tokenizer:
    """Byte-level BPE that adds a start token before a text and an end token after it."""
    tokenizer = byte_level()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<|bos|>", "<|end|>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|end|>", pair="$A $B", special_tokens=ends
    )
    return tokenizer


#: Tokenizers that recognise control tokens in unusual ways.
ODD_KINDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make for make in (normalized_tokens, greedy_tokens, standing_tokens, folding, lower_words)
}
KINDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make
    for make in (
        byte_level, metaspace_first, metaspace_always, prepending, no_prefix, unigram, with_bos_and_eos,
    )
}  # fmt: skip


def tokenizer_of(kind: str, template: str | None = None) -> PreTrainedTokenizerBase:
    """Make a tokenizer of one kind, with a template by name."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_built(kind)), bos_token="<|bos|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = None if template is None else TEMPLATES[template]
    return tokenizer


@cache
def _built(kind: str) -> str:
    tokenizer = (KINDS | ODD_KINDS)[kind]()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    return tokenizer.to_str()


def _sentencepiece(
    normalizer: normalizers.Normalizer | None, pre_tokenizer: pre_tokenizers.PreTokenizer | None
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace(prepend_scheme="never")
    raw_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *raw_bytes, *SPECIAL], limit_alphabet=60
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if pre_tokenizer is None:
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _without_raw_bytes_as_added(tokenizer, raw_bytes)


def _without_raw_bytes_as_added(tokenizer: Tokenizer, raw_bytes: list[str]) -> Tokenizer:
    """The trainer can only put them into the vocabulary as special tokens, which real ones are not."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] not in raw_bytes
    ]
    return Tokenizer.from_str(json.dumps(content))
