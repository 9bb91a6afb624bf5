"""The text of an answer: its tokens, decoded after their prompt, up to a stop string.

`tessera/chat/chat_format.py`, which the trainer shares, turns text into token ids; `detokenizer.py` decodes
single tokens. Knows neither HTTP nor the engine. A character that several tokens make up is held back until
it is complete, and text that may begin a stop string is held back until it is certain that it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase as Tokenizer

from service.generation.detokenizer import Decoding, Detokenizer
from tessera.chat.chat_format import ChatFormat
from tessera.chat.end_tokens import named_end_tokens
from tessera.chat.tokenizer import load_tokenizer
from tessera.errors import UnsupportedModel
from tessera.model.encoders import find_encoder
from tessera.model.files import model_folder


class TextCodec:
    """The base model's tokenizer, as the service uses it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        allow_control_tokens: bool = False,
        is_encoder: bool = False,
    ) -> None:
        """Takes the arguments of `ChatFormat`. Raises `UnsupportedModel` for a tokenizer without a fast
        backend."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise UnsupportedModel("the tokenizer has no fast backend (`tokenizers`)", param="base_model")
        self.chat = ChatFormat(
            tokenizer,
            eos_token_ids=eos_token_ids,
            allow_control_tokens=allow_control_tokens,
            is_encoder=is_encoder,
        )
        self._backend = backend
        #: The tokens at which a generation stops by itself.
        self.eos_token_ids = self.chat.end_ids
        self.token_text = lru_cache(maxsize=65_536)(self._token_text)
        self._shown = {skip: Detokenizer(backend, skip_special_tokens=skip) for skip in (True, False)}

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of a whole sequence; an unfinished character at its end is U+FFFD."""
        return self._shown[skip_special_tokens].decode(token_ids)

    def echo(
        self, token_ids: Sequence[int], text: str | None = None, *, skip_special_tokens: bool = True
    ) -> Echo:
        """Return the text of a prompt that is returned with its answer.

        It is `text` if the prompt was given as text, and otherwise the decoded tokens without an unfinished
        character at the end.
        """
        decoding = self._shown[skip_special_tokens].start()
        offsets, read, num_first = [], "", 0
        for token_id in token_ids:
            offsets.append(len(read))
            if decoding.is_at_start:
                num_first += 1
            read += decoding.push(token_id)
        if text is None:
            return Echo(read + decoding.finish(), offsets, num_first)
        return Echo(text, self._offsets_in(text, len(token_ids)), num_first)

    def _offsets_in(self, text: str, num_tokens: int) -> list[int]:
        """Return where in `text` each of its tokens begins.

        The parts follow each other without gaps, whatever the tokenizer normalised; a token that the
        tokenizer added has an empty part.
        """
        spans = self.chat.text_spans(text)
        offsets, end = [], 0
        for first, last in spans[:num_tokens]:
            offsets.append(min(first, end) if last > first else end)
            end = max(end, last)
        return offsets + [end] * (num_tokens - len(offsets))

    def stream(
        self,
        prompt_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        is_prompt_shown: bool = True,
    ) -> TextStream:
        """Decode the tokens that follow `prompt_ids`.

            text(ids) = decode(prompt_ids + ids) without its beginning, decode(prompt_ids)

        So a first word keeps its space if there is text before it. An unfinished character at the very end is
        left out, because more tokens might have finished it. A character that the prompt began belongs to the
        text if the text finishes it. Otherwise its U+FFFD belongs to the prompt, or to the text if
        is_prompt_shown is false.
        """
        decoding = self._shown[skip_special_tokens].start(prompt_ids, is_shown=is_prompt_shown)
        return TextStream(decoding, StopStrings(stop, include_stop), min_tokens)

    def _token_text(self, token_id: int, *, is_first: bool = False, skip_special_tokens: bool = True) -> str:
        """Return one token as text: `bytes:\\xe2\\x82` (OpenAI's form) for a part of a character, and the
        name of a special token that is skipped."""
        raw = self.token_bytes(token_id, is_first=is_first, skip_special_tokens=skip_special_tokens)
        if not raw and self._shown[skip_special_tokens].token(token_id) is None:
            return self._backend.id_to_token(token_id) or ""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_bytes(
        self, token_id: int, *, is_first: bool = False, skip_special_tokens: bool = True
    ) -> bytes:
        """Return the bytes that a token adds to a text; is_first: at the text's beginning. The bytes of all
        tokens make up the text, as far as it is valid UTF-8."""
        return self._shown[skip_special_tokens].token_bytes(token_id, is_first=is_first)


def load_text_codec(
    source: str | Path, *, revision: str | None = None, allow_control_tokens: bool = False
) -> TextCodec:
    """Return the codec of a base model, with the end tokens that its files name. Raises
    `UnsupportedModel`."""
    return TextCodec(
        load_tokenizer(source, revision=revision),
        eos_token_ids=named_end_tokens(model_folder(source, revision=revision)),
        allow_control_tokens=allow_control_tokens,
        is_encoder=find_encoder(model_folder(source, revision=revision)) is not None,
    )


@dataclass(frozen=True)
class Echo:
    """The text of a prompt, token by token."""

    text: str
    #: Where in `text` each token begins.
    offsets: Sequence[int]
    #: How many tokens have no text before them.
    num_first: int


@dataclass(frozen=True)
class StopStrings:
    """Strings that end a text."""

    strings: Sequence[str] = ()
    #: Whether the string that ends the text is a part of it.
    are_included: bool = False

    def find(self, text: str) -> int | None:
        """Return the length of `text` up to the stop string that begins first (the shortest of several); None
        without one."""
        found = [(at, len(stop)) for stop in self.strings if (at := text.find(stop)) >= 0]
        if not found:
            return None
        at, length = min(found)
        return at + length if self.are_included else at

    def safe_length(self, text: str) -> int:
        """Return how many characters of `text` cannot be a part of a stop string, whatever follows."""
        safe = len(text)
        for stop in self.strings:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    safe = min(safe, len(text) - length)
                    break
        return safe


class TextStream:
    """The text of one growing sequence.

    `push` takes one token and returns text that can be shown to the user at once. `is_stopped` becomes true
    when a stop string is found; `length` is then the length of the text up to it. The text of the first
    `min_tokens` tokens is not searched for stop strings.
    """

    def __init__(self, decoding: Decoding, stop: StopStrings, min_tokens: int) -> None:
        self._decoding = decoding
        self._stop = stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held_text = ""
        self.length = 0
        self.is_stopped = False

    @property
    def is_at_start(self) -> bool:
        """Whether the next token is the first of the text, where some tokenizers drop a leading space."""
        return self._decoding.is_at_start

    @property
    def includes_stop(self) -> bool:
        """Whether the stop string or token that ends the text is a part of it."""
        return self._stop.are_included

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that has become certain. Do not call it after a stop."""
        self._num_tokens += 1
        text = self._decoding.push(token_id)
        if text and self._stop.strings:
            return self._add(text)
        self.length += len(text)
        return text

    def flush(self) -> str:
        """Return the rest of the text when no token follows. An unfinished character is left out."""
        if self.is_stopped:
            return ""
        rest = self._decoding.finish()
        if not self._stop.strings:
            self.length += len(rest)
            return rest
        shown = self._add(rest)
        return shown if self.is_stopped else shown + self._release(len(self._held_text))

    def _add(self, text: str) -> str:
        """Search the text that has not been shown yet for stop strings; return what can be shown now."""
        self.length += len(text)
        self._held_text += text
        if self._num_tokens <= self._min_tokens:
            return self._release(len(self._held_text))
        cut = self._stop.find(self._held_text)
        if cut is not None:
            self.is_stopped = True
            self.length -= len(self._held_text) - cut
            return self._release(cut)
        return self._release(self._stop.safe_length(self._held_text))

    def _release(self, length: int) -> str:
        text, self._held_text = self._held_text[:length], self._held_text[length:]
        return text
