"""Small tokenizers with every kind of decoder that real models have, and a reference for their text."""

from __future__ import annotations

import re
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|user|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "▁",
    "▁▁",
    "▁a",
    "▁the",
    "a",
    "b",
    " ",
    "é",
    "世",
    "hello",
    "▁hello",
    "�",
    "END",
    "E",
    "ND",
    "\n",
    "x▁y",
]


def tokenizer_of(vocab: list[str], decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    """A tokenizer that can only decode. The special tokens come first."""
    names = ["<unk>", *SPECIAL, *vocab]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([AddedToken(name, special=True) for name in ["<unk>", *SPECIAL]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def byte_fallback(*, strips: bool) -> PreTrainedTokenizerFast:
    """Llama 2, Mistral, Phi-3 (`strips`: a text loses its first space) and Gemma (it keeps it)."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if strips else []
    return tokenizer_of([*BYTES, *WORDS], decoders.Sequence(steps))


#: Kinds for which `tokenizers` itself is the reference, because it decodes their text without loss.
EXACT: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "metaspace": lambda: tokenizer_of(WORDS, decoders.Metaspace()),
    "metaspace that keeps the first space": lambda: tokenizer_of(
        WORDS, decoders.Metaspace(prepend_scheme="never")
    ),
    "metaspace in a sequence": lambda: tokenizer_of(
        WORDS, decoders.Sequence([decoders.Metaspace(), decoders.Fuse(), decoders.Strip(" ", 0, 0)])
    ),
    "several spaces stripped": lambda: tokenizer_of(
        WORDS, decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)])
    ),
    "wordpiece": lambda: tokenizer_of(
        ["hello", "##lo", "##s", "don", "'", "t", "n't", ".", ",", "世", "�"], decoders.WordPiece()
    ),
    "wordpiece without cleanup": lambda: tokenizer_of(
        ["hello", "##lo", ".", "'s"], decoders.WordPiece(cleanup=False)
    ),
    "word ends": lambda: tokenizer_of(
        ["hel", "lo</w>", "a</w>", "b", ".</w>", "</w>"], decoders.BPEDecoder()
    ),
    "ctc": lambda: tokenizer_of(["<pad>", "|", "a", "b", "é", "'"], decoders.CTC()),
    "none": lambda: tokenizer_of(["hello", "a", ",", "世"], None),
    "fuse": lambda: tokenizer_of(WORDS, decoders.Fuse()),
    "nothing in a sequence": lambda: tokenizer_of(WORDS, decoders.Sequence([])),
    "replaced afterwards": lambda: tokenizer_of(
        WORDS, decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")])
    ),
    "pattern": lambda: tokenizer_of(
        WORDS, decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.Fuse()])
    ),
}
BYTE_FALLBACK: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte fallback": lambda: byte_fallback(strips=False),
    "byte fallback that strips": lambda: byte_fallback(strips=True),
}


def byte_fallback_text(tokens: list[str], *, strips: bool) -> str:
    """The reference: read runs of byte tokens like SentencePiece, which keeps valid characters and writes
    U+FFFD for every other byte."""
    text, run = "", b""
    for token in [*tokens, ""]:
        if re.fullmatch("<0x..>", token):
            run += bytes([int(token[3:5], 16)])
        else:
            text += _characters(run) + token.replace("▁", " ")
            run = b""
    return text.removeprefix(" ") if strips else text


def _characters(run: bytes) -> str:
    text = ""
    while run:
        for length in range(1, 5):
            try:
                text, run = text + run[:length].decode(), run[length:]
                break
            except UnicodeDecodeError:
                continue
        else:
            text, run = text + "\ufffd", run[1:]
    return text


def llama2() -> PreTrainedTokenizerFast:
    """A complete byte-fallback tokenizer that puts a start token and a space in front of a text."""
    vocab = ["<unk>", *SPECIAL, *BYTES, "▁", "h", "e", "l", "o", "▁h", "▁he", "lo", "▁w", "w", "a", "é", "�"]
    merges = [("▁", "h"), ("▁h", "e"), ("l", "o"), ("▁", "w")]
    ids = {name: i for i, name in enumerate(vocab)}
    model = models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = byte_fallback(strips=True).backend_tokenizer.decoder
    backend.add_special_tokens([AddedToken(name, special=True) for name in ["<unk>", *SPECIAL]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
