"""A user's text cannot forge a turn: control tokens that are typed in a message are encoded as plain text.

A chat template writes control tokens (`<|im_end|>`, `[INST]`) between the messages, and a tokenizer finds
them wherever they stand, also in what a user typed. Here the two are told apart:

1. Before the template runs, each control token that a message holds is replaced by a mark: one private-use
   character that no text of the request contains.
2. The control tokens that are left in the rendering are the template's own. They are renamed to secret words.
3. The marks are turned back into what was typed, and the whole is encoded in one go by a second tokenizer
   over the same model, which knows the control tokens by their secret words only.

So the ids are those that the tokenizer would give if it had overlooked the typed tokens, to the last merge. A
rendering without marks never comes here. `docs/training-data.md` ("Control tokens") has the limits.
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

#: Planes 15 and 16: characters without a meaning, which no text should hold.
_PRIVATE_USE = range(0xF0000, 0x10FFFE)
#: Fields of a message between which and its turn's marks a template puts something.
_LONG_FIELDS = ("role", "content")
_TAG = re.compile(r"<(\w+)>")


@dataclass(frozen=True)
class Marks:
    """What stands for the typed control tokens of one conversation.

    first: code point of the mark of the first control token; the others follow, and then the border.
    """

    first: int
    tokens: tuple[str, ...]

    def of(self, token: str) -> str:
        return chr(self.first + self.tokens.index(token))

    @property
    def border(self) -> str:
        """Keeps a message's first or last characters from making a control token with the template's text."""
        return chr(self.first + len(self.tokens))

    def meanings(self) -> dict[int, str]:
        """Table for `str.translate`: marks back to text."""
        return {self.first + i: token for i, token in enumerate((*self.tokens, ""))}


class ControlTokens:
    """The control tokens of one tokenizer and its template, and how to encode text in which they are typed.

    Control tokens are the tokenizer's special tokens, and those of its other added tokens that the template
    writes. In an assistant's message tags that come in pairs (`<think>`, `</think>`), are not special, and
    do not stand round questions as well are the model's own words and stay tokens.
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
        """Messages and template variables with marks for what was typed, and what encodes their rendering.

        All three as they came if no text needs a mark.
        """
        shown = [text for message in messages for key, text in message.items() if key != "role"]
        texts = list(_strings([shown, list(variables.values())]))
        short = [text for message in messages for key, text in message.items() if key not in _LONG_FIELDS]
        if not any(map(self._is_suspicious, texts)) and not any(map(self._is_inside, _strings(short))):
            return messages, variables, encode
        marks = self._marks(texts)
        marked = [self._marked(message, marks) for message in messages]
        named = {name: self._replaced(value, marks) for name, value in variables.items()}
        return marked, named, partial(self.encode, marks)

    def mark_answer(self, text: str) -> tuple[str, Encode] | None:
        """An assistant's text with marks, and what encodes it; None if no control token is typed in it."""
        typed = self._typed_by_assistant
        if not typed.search(text) and not typed.search(self._normal(text)):
            return None
        marks = self._marks([text])
        return self._with_marks(text, typed, marks), partial(self.encode, marks)

    def encode(self, marks: Marks, marked: str) -> list[int]:
        """Token ids of a rendering with marks. Raises `InvalidInput` if a typed token cannot be plain."""
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
        """Whether the text holds a control token, or could make one with what surrounds it."""
        if self._typed.search(text):
            return True
        if self._normalizer is not None and self._typed.search(self._normal(text)):
            return True
        return self._begins_inside(text) or self._ends_inside(text)

    def _is_inside(self, text: str) -> bool:
        """Whether a template can make a control token by putting something round the text."""
        return any(text in token for token in self._tokens)

    def _begins_inside(self, text: str) -> bool:
        return any(text[:n] in self._endings for n in range(1, self._longest))

    def _ends_inside(self, text: str) -> bool:
        return any(text[-n:] in self._beginnings for n in range(1, min(self._longest, len(text) + 1)))

    def _normal(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def _marks(self, texts: list[str]) -> Marks:
        """Marks of which no character is used in `texts`."""
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
        """The text with a mark for each match of `typed`.

        Where normalising makes tokens that the model reads as such (`＜s＞`), it is done here already.
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
    """A tokenizer that knows the control tokens by secret names only. names: control token → secret name."""

    def __init__(self, tokenizer: Tokenizer, control: Mapping[str, int]) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise InvalidInput("this tokenizer cannot encode control tokens as plain text", param="messages")
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
        """Token ids; None if the model made a control token out of plain text."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if not self._control_ids.isdisjoint(i for i in ids if i not in self._ids):
            return None
        return [self._ids.get(i, i) for i in ids if i != self._cut_id]

    def cut(self, text: str) -> str:
        """The text, such that the model reads its first character apart."""
        return text[:1] + self._cut + text[1:] if text else ""


def _readable(model: Any, control: Mapping[str, int], unknown: int | None) -> set[str]:
    """The control tokens that the model itself reads out of their text, because they are words to it."""
    ids = {*control.values()} - {unknown}
    known = [token for token in control if model.token_to_id(token) is not None]
    return {token for token in known if not ids.isdisjoint(t.id for t in model.tokenize(token))}


def _renamed(token: AddedToken, name: str) -> AddedToken:
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    return AddedToken(name, **{flag: getattr(token, flag) for flag in flags})


def _secret_name() -> str:
    """Letters that nobody can guess, lower case because normalizers do not change that.

    The private-use characters at its ends are no letters: a token may have to stand apart from words.
    """
    letters = "".join(secrets.choice(string.ascii_lowercase) for _ in range(32))
    return f"\ue000{letters}\ue000"


def any_of(tokens: Iterable[str]) -> str:
    """A pattern of the tokens, of which the longest that fits matches; of none: one that matches nothing."""
    return "|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))) or "(?!)"


def _pattern(token: AddedToken) -> str:
    """Where a tokenizer finds the token: anywhere, or only apart from words."""
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
