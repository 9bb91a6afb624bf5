"""Token ids to text, token by token, for every decoder of the `tokenizers` library.

`tokenizers.decoders.DecodeStream` decodes a window again and again, and raises when an invalid byte changes
the text that the window had before. Here every token adds a *piece*, text or bytes, which depends on nothing
but whether the token is the first; bytes that are not a character yet wait for those that follow. For the few
decoders in which a token's text depends on the token before it, pairs are decoded.

    text(ids) = UTF-8( piece(id_0) + piece(id_1) + … )      a token that is not shown has no piece

An invalid byte becomes U+FFFD and damages nothing beside it. A byte-level tokenizer gets one U+FFFD for each
maximal invalid sequence (like `tokenizers`), a byte-fallback tokenizer one for each byte (like SentencePiece;
`tokenizers` turns the valid characters of the same run into U+FFFD as well).

Knows neither prompts, stop strings nor requests.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

REPLACEMENT = "\ufffd"
#: Error handlers of `codecs.utf_8_decode`: one U+FFFD for a maximal invalid sequence, or one for each byte.
_PER_SEQUENCE, _PER_BYTE = "replace", "tessera_replace_each_byte"
#: An unfinished UTF-8 character has at most this many bytes.
_MAX_UNFINISHED_BYTES = 3
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: A placeholder for "some text before", where a token's text depends on whether there is any.
_ANCHOR = "a"


class Detokenizer:
    """Decodes the tokens of one tokenizer. skip_special_tokens: whether special tokens have no text."""

    def __init__(self, backend: Backend, *, skip_special_tokens: bool = True) -> None:
        added = backend.get_added_tokens_decoder()
        self._skipped = {i for i, token in added.items() if token.special} if skip_special_tokens else set()
        self._backend = backend
        steps = _unrolled(json.loads(backend.decoder.__getstate__())) if backend.decoder else []
        kinds = [step["type"] for step in steps]
        self._is_byte_level = kinds in (["ByteLevel"], ["ByteLevel", "Fuse"])
        self._has_byte_tokens = "ByteFallback" in kinds
        self._errors = _PER_BYTE if self._has_byte_tokens else _PER_SEQUENCE
        self._stripped, self.num_to_strip, body = _leading_strip(steps)
        self._is_separable = self._is_byte_level or _is_separable(body)
        is_whole = backend.decoder is None or not self._is_separable
        self._decoder = backend.decoder if is_whole else _decoder_of(body)
        self.piece = lru_cache(maxsize=65_536)(self._piece)
        #: The piece of a token before which no other one stands, before `strip`.
        self.first_piece = lru_cache(maxsize=4096)(partial(self._piece, before=()))

    def start(self, token_ids: Sequence[int] = (), *, is_shown: bool = True) -> Decoding:
        """Begin to decode the tokens that follow `token_ids`.

        is_shown: the text of `token_ids` was shown, with U+FFFD for an unfinished character at its end. That
        character is shown again only if the next tokens finish it.
        """
        if not self._is_separable:
            return _PairDecoding(self, token_ids)
        return Decoding(self, token_ids, is_shown=is_shown)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the whole text of a sequence; an unfinished character at its end is U+FFFD."""
        decoding = self.start()
        text = "".join(map(decoding.push, token_ids))
        return text + decoding.finish() + decoding.unfinished()

    def token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it. None if it has no text: it is skipped, or outside the
        vocabulary (a model may have more rows than its tokenizer has tokens)."""
        return None if token_id in self._skipped else self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        """Return the UTF-8 bytes that a token adds to a text; is_first: at the text's very beginning."""
        piece = self.piece(token_id)
        if is_first:
            piece = self.strip(self.first_piece(token_id), self.num_to_strip)
        return piece.encode("utf-8") if isinstance(piece, str) else piece

    def strip(self, piece: str | bytes, limit: int) -> str | bytes:
        """`piece` without up to `limit` of the characters that the decoder strips from a text's front."""
        while limit > 0 and isinstance(piece, str) and piece.startswith(self._stripped):
            piece, limit = piece[1:], limit - 1
        return piece

    def decode_tokens(self, tokens: list[str]) -> str:
        """Decode a list of tokens with the tokenizer's own decoder."""
        return " ".join(tokens) if self._decoder is None else str(self._decoder.decode(tokens))

    def decode_bytes(self, raw: bytes, *, is_last: bool = False) -> tuple[str, bytes]:
        """Return the text of the complete characters in `raw`, and the bytes of an unfinished one at its
        end."""
        text, num_read = codecs.utf_8_decode(raw, self._errors, is_last)
        return text, raw[num_read:]

    def _piece(self, token_id: int, *, before: Sequence[str] = (_ANCHOR,)) -> str | bytes:
        """Return the text of a token, or its bytes if they are not text by themselves."""
        token = self.token(token_id)
        if token is None:
            return ""
        if self._is_byte_level:
            return _text_or_bytes(_byte_level_bytes(token))
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return _text_or_bytes(bytes([int(match[1], 16)]))
        if not self._is_separable:
            return self.decode_tokens([token])
        return self.decode_tokens([*before, token])[len(self.decode_tokens([*before])) :]


class Decoding:
    """The text of one growing sequence, to which every token adds its piece.

    At most one unfinished character is kept.
    """

    def __init__(self, tokens: Detokenizer, token_ids: Sequence[int], *, is_shown: bool) -> None:
        #: Whether nothing has been decoded yet, so that the next token may lose its space.
        self.is_at_start = True
        self._tokens = tokens
        self._piece = tokens.piece
        self._has_token = False
        self._num_to_strip = tokens.num_to_strip
        for token_id in token_ids:
            self._first_piece(token_id)
            if not self.is_at_start:
                break
        self._pending = _unfinished_end(token_ids, self._piece)
        self._shown = self.unfinished() if is_shown and self._pending else ""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that has become certain."""
        piece = self._first_piece(token_id) if self.is_at_start else self._piece(token_id)
        if not self._pending and piece.__class__ is str:
            return piece  # type: ignore[return-value]
        return self._join(piece) if piece else ""

    def finish(self) -> str:
        """Return the text that becomes certain when no token follows, without an unfinished character."""
        return ""

    def unfinished(self) -> str:
        """U+FFFD for an unfinished character, as decoding the whole sequence would show it."""
        return self._tokens.decode_bytes(self._pending, is_last=True)[0]

    def _join(self, piece: str | bytes) -> str:
        raw = self._pending + (piece.encode("utf-8") if isinstance(piece, str) else piece)
        text, self._pending = self._tokens.decode_bytes(raw)
        if text and self._shown:
            text, self._shown = text.removeprefix(self._shown), ""
        return text

    def _first_piece(self, token_id: int) -> str | bytes:
        """Return the piece of a token while `is_at_start`."""
        if self._tokens.token(token_id) is None:
            return ""
        piece = self._piece(token_id) if self._has_token else self._tokens.first_piece(token_id)
        self._has_token = True
        if self._num_to_strip:
            num_before = len(piece)
            piece = self._tokens.strip(piece, self._num_to_strip)
            self._num_to_strip = 0 if piece else self._num_to_strip - num_before
        self.is_at_start = self._num_to_strip > 0
        return piece


class _PairDecoding(Decoding):
    """A decoding where a token's text depends on the token before it (`BPEDecoder`, `CTC`, unusual
    sequences).

    A token adds the difference between the text of the pair and the text of the token before it. Text that
    ends with U+FFFD is held back for as many tokens as may make up a character.
    """

    def __init__(self, tokens: Detokenizer, token_ids: Sequence[int]) -> None:
        self.is_at_start = False
        self._tokens = tokens
        self._pending = b""
        visible = (token for token in map(tokens.token, reversed(token_ids)) if token is not None)
        self._before = list(itertools.islice(visible, 1))
        self._held: list[str] = []

    def push(self, token_id: int) -> str:
        """Add a token, and return the text that has become certain."""
        token = self._tokens.token(token_id)
        if token is None:
            return ""
        self._held.append(token)
        text = self._added()
        if text.endswith(REPLACEMENT) and len(self._held) <= _MAX_UNFINISHED_BYTES:
            return ""
        self._before, self._held = [token], []
        return text

    def finish(self) -> str:
        text, self._held = self._added(), []
        return text

    def _added(self) -> str:
        """Return the text that the held tokens add."""
        before = self._tokens.decode_tokens(self._before) if self._before else ""
        text = self._tokens.decode_tokens([*self._before, *self._held])
        same = 0
        while same < min(len(before), len(text)) and before[same] == text[same]:
            same += 1
        return text[same:]


def _unfinished_end(token_ids: Sequence[int], piece: Any) -> bytes:
    """Return the bytes of a character that the last tokens began and did not finish."""
    tail = b""
    for token_id in reversed(token_ids):
        last = piece(token_id)
        if isinstance(last, bytes):
            tail = last + tail
        if len(tail) >= _MAX_UNFINISHED_BYTES or (last and isinstance(last, str)):
            break
    for length in range(min(_MAX_UNFINISHED_BYTES, len(tail)), 0, -1):
        try:
            if codecs.utf_8_decode(tail[-length:], "strict", False) == ("", 0):
                return tail[-length:]
        except UnicodeDecodeError:
            continue
    return b""


def _unrolled(step: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a decoder, with nested sequences flattened."""
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in _unrolled(part)]


def _leading_strip(steps: list[dict[str, Any]]) -> tuple[str, int, list[dict[str, Any]]]:
    """Return the character that the last step strips from the front of the whole text, how many of them at
    most, and the steps before that one."""
    kinds = [step["type"] for step in steps]
    if len(steps) > 1 and kinds[-1] == "Strip" and "Fuse" in kinds and not steps[-1]["stop"]:
        return steps[-1]["content"], steps[-1]["start"], steps[:-1]
    return "", 0, steps


def _is_separable(steps: list[dict[str, Any]]) -> bool:
    """Whether a token's text depends on nothing but the token itself and whether it is the first."""
    kinds = [step["type"] for step in steps]
    end = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    apart, whole = steps[:end], steps[end + 1 :]
    known = {"Replace", "Metaspace", "WordPiece", "ByteFallback", "Strip"}
    if not {step["type"] for step in apart} <= known:
        return False
    after_bytes = kinds[kinds.index("ByteFallback") + 1 : end] if "ByteFallback" in kinds else []
    if "WordPiece" in after_bytes or "Strip" in after_bytes:
        return False
    return all(
        step["type"] == "Fuse" or (step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1)
        for step in whole
    )


def _decoder_of(steps: list[dict[str, Any]]) -> decoders.Decoder:
    decoder = decoders.Fuse()
    decoder.__setstate__(json.dumps({"type": "Sequence", "decoders": steps}).encode())
    return decoder


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_PER_BYTE, _replace_each_byte)


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte: printable Latin-1 is itself, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token. One outside the alphabet (an added token) is its own text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def _text_or_bytes(raw: bytes) -> str | bytes:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw
