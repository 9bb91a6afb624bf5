"""Token ids to text: incremental decoding and stop strings, for the service alone.

From text to token ids is `adapter_core/chat_format.py`, which the trainer shares. Knows the tokenizer and
nothing else: no HTTP, no engine. A character that several tokens make up is held back
until it is whole, and text that may be the beginning of a stop string until it is clear that it is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapter_core.base_model import load_tokenizer, model_folder
from adapter_core.chat_format import ChatFormat
from adapter_core.errors import UnsupportedModel

#: Tokens of the prompt that the decoder is shown first: some tokenizers strip the space of a first word.
_CONTEXT_TOKENS = 6
#: A UTF-8 character has at most 4 bytes, so at most 4 tokens. Bytes that are still no character after twice
#: as many never will be: they are let go as U+FFFD, or the decoder would hold (and decode) ever more of them.
_MAX_HELD_TOKENS = 8
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class TextCodec:
    """The base model's tokenizer, as the service uses it. eos_token_ids: what ends a generation by itself."""

    def __init__(self, tokenizer: Tokenizer, *, eos_token_ids: Iterable[int] = ()) -> None:
        """Raises `UnsupportedModel` for a tokenizer without a fast backend."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise UnsupportedModel("the tokenizer has no tokenizers backend", param="base_model")
        self.chat = ChatFormat(tokenizer)
        self._backend = backend
        own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self.eos_token_ids = tuple(sorted({*own, *eos_token_ids}))
        self._is_byte_level = b'"ByteLevel"' in backend.decoder.__getstate__() if backend.decoder else False
        self.token_bytes = lru_cache(maxsize=65_536)(self._token_bytes)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole sequence, special tokens left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def stream(
        self, prompt_ids: Sequence[int], *, stop: Sequence[str] = (), min_tokens: int = 0
    ) -> TextStream:
        """A decoder for what follows `prompt_ids`."""
        return TextStream(self._backend, prompt_ids, StopStrings(stop), min_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text; `bytes:\\xe2\\x82` (OpenAI's form) for a part of a character."""
        raw = bytes(self.token_bytes(token_id))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _token_bytes(self, token_id: int) -> tuple[int, ...]:
        token = self._backend.id_to_token(token_id)
        if token is None:  # the embedding matrix may be padded beyond the vocabulary
            return ()
        if self._is_byte_level and all(character in _BYTE_OF for character in token):
            return tuple(_BYTE_OF[character] for character in token)
        if match := _BYTE_FALLBACK.fullmatch(token):
            return (int(match[1], 16),)
        return tuple(token.replace("▁", " ").encode("utf-8", "replace"))


def load_text_codec(source: str | Path, *, revision: str | None = None) -> TextCodec:
    """The codec of a base model, with the end-of-text tokens that its generation_config.json names.

    Raises `UnsupportedModel`.
    """
    config = model_folder(source, revision=revision) / "generation_config.json"
    named = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id") if config.exists() else None
    eos_token_ids = [named] if isinstance(named, int) else named or []
    return TextCodec(load_tokenizer(source, revision=revision), eos_token_ids=eos_token_ids)


def _byte_level_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable Latin-1 is itself, the other bytes follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


@dataclass(frozen=True)
class StopStrings:
    """Strings that end a text and are not part of it."""

    strings: Sequence[str] = ()

    def find(self, text: str) -> int | None:
        """Where the earliest stop string begins in `text`."""
        found = [at for stop in self.strings if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def safe_length(self, text: str) -> int:
        """How much of `text` can be no part of a stop string, whatever follows."""
        safe = len(text)
        for stop in self.strings:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    safe = min(safe, len(text) - length)
                    break
        return safe


class TextStream:
    """The text of one growing sequence.

    `push` token by token; what it returns can be shown to the user at once. `is_stopped` turns true when a
    stop string is met; then `length` is the length of the text before it. Stop strings are not looked for
    in what the first `min_tokens` tokens bring.
    """

    def __init__(
        self, backend: Backend, prompt_ids: Sequence[int], stop: StopStrings, min_tokens: int
    ) -> None:
        context = list(prompt_ids[-_CONTEXT_TOKENS:])
        if backend.decode(context, skip_special_tokens=True).endswith("\ufffd"):
            context = []  # half a character: the decoder would give it back with the first token
        self._backend = backend
        self._decoder = DecodeStream(ids=context, skip_special_tokens=True)
        self._stop = stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held_tokens: list[int] = []
        self._held_text = ""
        self.length = 0
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Text that has become certain. Nothing follows a stop."""
        self._num_tokens += 1
        text = self._decode(token_id)
        self._held_text += text
        self.length += len(text)
        if self._num_tokens <= self._min_tokens:
            return self._release(len(self._held_text))
        cut = self._stop.find(self._held_text)
        if cut is not None:
            self.is_stopped = True
            self.length -= len(self._held_text) - cut
            return self._release(cut)
        return self._release(self._stop.safe_length(self._held_text))

    def flush(self) -> str:
        """The rest, when no token follows. Bytes that never became a character are dropped."""
        return "" if self.is_stopped else self._release(len(self._held_text))

    def _release(self, length: int) -> str:
        text, self._held_text = self._held_text[:length], self._held_text[length:]
        return text

    def _decode(self, token_id: int) -> str:
        text = self._decoder.step(self._backend, token_id)
        if text is not None:
            self._held_tokens.clear()
            return text
        self._held_tokens.append(token_id)
        if len(self._held_tokens) < _MAX_HELD_TOKENS:
            return ""
        text = self._backend.decode(self._held_tokens, skip_special_tokens=True)
        self._held_tokens.clear()
        self._decoder = DecodeStream(skip_special_tokens=True)
        return text
