"""Encoding control tokens that a user typed in a message as plain text, so that nobody can forge a turn.

A chat template writes control tokens (`<|im_end|>`, `[INST]`) between the messages. A tokenizer recognises
them everywhere, also in text that a user has typed. This module distinguishes the two:

1. Before the template runs, each control token in a message is replaced by a mark: a private-use character
that
   no text of the request contains.
2. The control tokens in the rendering are now those of the template. They are renamed to secret words.
3. The marks are replaced by the typed text, and the whole is encoded at once by a second tokenizer over the
   same model, which knows the control tokens only by their secret words.

The ids are exactly those that the tokenizer would give if it did not recognise the typed tokens, including
all merges. A rendering without marks does not come here. `docs/training-data.md` ("Control tokens") has the
limits.
"""

from __future__ import annotations

import re
import secrets
import string
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase as Tokenizer

from tessera.chat.template import TurnShape
from tessera.errors import InvalidInput

#: Text to token ids.
Encode = Callable[[str], list[int]]

#: Characters of planes 15 and 16, which have no meaning and should occur in no text.
_PRIVATE_USE = range(0xF0000, 0x10FFFE)
#: Fields of a message that a template separates from the control tokens of the turn.
_LONG_FIELDS = ("role", "content")
_TAG = re.compile(r"<(\w+)>")


@dataclass(frozen=True)
class Marks:
    """The characters that stand for the typed control tokens of one conversation."""

    #: Code point of the mark of the first control token. Those of the others follow, then that of the border.
    first: int
    tokens: tuple[str, ...]

    def of(self, token: str) -> str:
        return chr(self.first + self.tokens.index(token))

    @property
    def border(self) -> str:
        """Keeps the ends of a message from forming a control token with text of the template."""
        return chr(self.first + len(self.tokens))

    def meanings(self) -> dict[int, str]:
        """Return a table for `str.translate` from marks to text."""
        return {self.first + i: token for i, token in enumerate((*self.tokens, ""))}


class ControlTokens:
    """The control tokens of one tokenizer and its template, and the encoding of text that contains them.

    Control tokens are the special tokens of the tokenizer, and its other added tokens that the template
    writes. In messages of an assistant, some tags are words of the model and stay tokens: those that come in
    pairs (`<think>`, `</think>`), are not special, and are not written around questions.
    """

    def __init__(self, tokenizer: Tokenizer, shape: TurnShape) -> None:
        written = shape.written
        added = tokenizer.added_tokens_decoder
        self._tokenizer, self._added = tokenizer, added
        control = {
            token.content: token_id
            for token_id, token in added.items()
            if token.special or (token.content in written and not token.content.isspace())
        }
        self._ids = control
        self._tokens = tuple(control)
        contents = {token.content for token in added.values()}
        plain_added = {token.content for token in added.values() if not token.special}
        pairs = {t for t in plain_added if (m := _TAG.fullmatch(t)) and f"</{m[1]}>" in contents}
        own = pairs | {f"</{tag[1:]}" for tag in pairs}
        self._typed = re.compile(any_of(self._tokens))
        own = {token for token in own if token not in shape.asked}
        own -= {token.content for token in added.values() if token.special}
        self._typed_by_assistant = re.compile(any_of(set(self._tokens) - own))
        self._every_added = re.compile(
            "|".join(map(_pattern, sorted(added.values(), key=lambda token: -len(token.content)))) or "(?!)"
        )
        self._longest = max(map(len, self._tokens), default=0)
        cuts = [(token[:i], token[i:]) for token in self._tokens for i in range(1, len(token))]
        self._beginnings = {head for head, _ in cuts if not head.isspace()}
        self._endings = {tail for _, tail in cuts if not tail.isspace()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._readable = _readable(backend.model, control, tokenizer.unk_token_id) if backend else set()
        self._typed_readable = re.compile(any_of(self._readable))
        is_normalized = self._readable or any(added[i].normalized for i in control.values())
        self._normalizer = backend.normalizer if backend and is_normalized else None
        self._encoder: _RenamedEncoder | None = None
        self._making = threading.Lock()

    def mark(
        self, messages: list[dict[str, Any]], variables: Mapping[str, Any], encode: Encode
    ) -> tuple[list[dict[str, Any]], Mapping[str, Any], Encode]:
        """Replace typed control tokens by marks; return messages, variables and the encoder to use.

        All three are returned unchanged if no text needs a mark.
        """
        values, short_values = list(variables.values()), []
        for message in messages:
            values += [value for key, value in message.items() if key != "role"]
            short_values += [value for key, value in message.items() if key not in _LONG_FIELDS]
        texts = list(_strings(values))
        if not any(map(self._is_suspicious, texts)) and not any(map(self._is_inside, _strings(short_values))):
            return messages, variables, encode
        marks = self._marks(texts)
        marked = [self._marked(message, marks) for message in messages]
        named = {name: self._replaced(value, marks) for name, value in variables.items()}
        return marked, named, partial(self.encode, marks)

    def mark_answer(self, text: str) -> tuple[str, Encode] | None:
        """Mark the text of an assistant, and return it with its encoder; None if nothing is marked."""
        typed = self._typed_by_assistant
        if not typed.search(text) and not typed.search(self._normal(text)):
            return None
        marks = self._marks([text])
        return self._with_marks(text, typed, marks), partial(self.encode, marks)

    def encode(self, marks: Marks, marked: str) -> list[int]:
        """Encode a rendering with marks. Raises `InvalidInput` if a typed token cannot be plain text."""
        encoder = self._get_encoder()
        own = self._every_added.sub(lambda m: encoder.names.get(m[0], m[0]), marked)
        meanings = marks.meanings()
        plain = {at: encoder.cut(text) if text in self._readable else text for at, text in meanings.items()}
        ids = encoder.encode(own.translate(plain))
        if ids is None:
            ids = encoder.encode(own.translate({at: encoder.cut(text) for at, text in meanings.items()}))
        if ids is None:
            raise InvalidInput(
                "a message holds a control token that this tokenizer cannot encode as plain text; remove it",
                param="messages",
                code="control_token",
            )
        return ids

    def _is_suspicious(self, text: str) -> bool:
        """Return whether the text contains a control token, or could form one with the text around it."""
        if self._typed.search(text):
            return True
        if self._normalizer is not None and self._typed.search(self._normal(text)):
            return True
        return self._begins_inside(text) or self._ends_inside(text)

    def _is_inside(self, text: str) -> bool:
        """Return whether a template can form a control token by adding text around this one."""
        return any(text in token for token in self._tokens)

    def _begins_inside(self, text: str) -> bool:
        return any(text[:n] in self._endings for n in range(1, self._longest))

    def _ends_inside(self, text: str) -> bool:
        return any(text[-n:] in self._beginnings for n in range(1, min(self._longest, len(text) + 1)))

    def _normal(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def _marks(self, texts: list[str]) -> Marks:
        """Choose marks that do not occur in `texts`."""
        used = {ord(c) for text in texts for c in set(text) if ord(c) >= _PRIVATE_USE.start}
        size = len(self._tokens) + 1
        for first in range(_PRIVATE_USE.start, _PRIVATE_USE.stop - size, size):
            if used.isdisjoint(range(first, first + size)):
                return Marks(first, self._tokens)
        raise InvalidInput("the messages hold too many private-use characters", param="messages")

    def _marked(self, message: dict[str, Any], marks: Marks) -> dict[str, Any]:
        pattern = self._typed_by_assistant if message.get("role") == "assistant" else self._typed
        marked = dict(message)
        for key, value in message.items():
            if not isinstance(value, str) or key == "role":
                continue
            text = self._with_marks(value, pattern, marks)
            is_inside = key not in _LONG_FIELDS and self._is_inside(value)
            before = marks.border if is_inside or self._begins_inside(value) else ""
            after = marks.border if is_inside or self._ends_inside(value) else ""
            marked[key] = before + text + after
        return marked

    def _with_marks(self, text: str, typed: re.Pattern[str], marks: Marks) -> str:
        """Replace each match of `typed` by its mark.

        If normalising creates tokens that the model reads as such (`＜s＞`), the text is normalised first.
        """
        normal = self._normal(text) if self._readable else text
        if len(self._typed_readable.findall(normal)) > len(self._typed_readable.findall(text)):
            text = normal
        return typed.sub(lambda m: marks.of(m[0]), text)

    def _replaced(self, value: Any, marks: Marks) -> Any:
        if isinstance(value, str):
            return self._with_marks(value, self._typed, marks)
        if isinstance(value, Mapping):
            return {self._replaced(k, marks): self._replaced(v, marks) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._replaced(item, marks) for item in value]
        return value

    def _get_encoder(self) -> _RenamedEncoder:
        with self._making:
            if self._encoder is None:
                self._encoder = _RenamedEncoder(self._tokenizer, self._ids)
            return self._encoder


class _RenamedEncoder:
    """A tokenizer that knows the control tokens only by secret names."""

    def __init__(self, tokenizer: Tokenizer, control: Mapping[str, int]) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise InvalidInput("this tokenizer cannot encode control tokens as plain text", param="messages")
        #: Control token → secret name.
        self.names = {token: _secret_name() for token in control}
        self._cut = _secret_name()
        self._backend = Backend(backend.model)  # shares the model: no copy of the vocabulary
        self._backend.normalizer, self._backend.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        vocabulary = backend.get_vocab(with_added_tokens=False)
        holes = max(vocabulary.values(), default=-1) + 1 - len(vocabulary)
        if holes > 0:  # new tokens are numbered from the size of the vocabulary on
            self._backend.add_tokens([_secret_name() for _ in range(holes)])
        self._ids: dict[int, int] = {}
        for token_id, token in sorted(backend.get_added_tokens_decoder().items()):
            name = self.names.get(token.content, token.content)
            self._backend.add_tokens([_renamed(token, name)])
            own = self._backend.token_to_id(name)
            assert own is not None, "the token has just been added"
            self._ids[own] = token_id
        self._backend.add_tokens([AddedToken(self._cut, special=True, normalized=False)])
        self._cut_id = self._backend.token_to_id(self._cut)
        unknown = self._backend.encode(chr(_PRIVATE_USE.stop - 1), add_special_tokens=False).ids
        self._control_ids = {*control.values()} - {tokenizer.unk_token_id, *unknown}

    def encode(self, text: str) -> list[int] | None:
        """Encode the text; None if the model has made a control token out of plain text."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if not self._control_ids.isdisjoint(i for i in ids if i not in self._ids):
            return None
        return [self._ids.get(i, i) for i in ids if i != self._cut_id]

    def cut(self, text: str) -> str:
        """Separate the first character of the text, so that the model does not read the text as one word."""
        return text[:1] + self._cut + text[1:] if text else ""


def _readable(model: Any, control: Mapping[str, int], unknown: int | None) -> set[str]:
    """Return the control tokens that are words of the model, so that it finds them in plain text."""
    ids = {*control.values()} - {unknown}
    known = [token for token in control if model.token_to_id(token) is not None]
    return {token for token in known if not ids.isdisjoint(t.id for t in model.tokenize(token))}


def _renamed(token: AddedToken, name: str) -> AddedToken:
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    return AddedToken(name, **{flag: getattr(token, flag) for flag in flags})


def _secret_name() -> str:
    """Make a word that nobody can guess, in lower case because normalizers do not change that.

    The private-use characters at its ends are not letters, because some tokens must not touch words.
    """
    letters = "".join(secrets.choice(string.ascii_lowercase) for _ in range(32))
    return f"\ue000{letters}\ue000"


def any_of(tokens: Iterable[str]) -> str:
    """Make a pattern that matches the longest fitting token; without tokens, one that matches nothing."""
    return "|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))) or "(?!)"


def _pattern(token: AddedToken) -> str:
    """Make the pattern by which a tokenizer finds the token: anywhere, or only outside words."""
    text = re.escape(token.content)
    return rf"(?<!\w){text}(?!\w)" if token.single_word else text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
