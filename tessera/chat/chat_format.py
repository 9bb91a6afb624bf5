"""Turning messages and examples into token ids, with the chat template of the tokenizer.

Service and trainer must agree on every token, so both use this class. It knows neither a model nor a file.

Training uses what serving will see. Every answer is preceded by the ids of its prompt, exactly as the chat
endpoint sends them. Then comes what the model has to generate: the text of the answer as its author wrote it,
tokenised separately, and the token that ends a turn. See `docs/training-data.md`, "What is learned".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from tessera.chat.control_tokens import ControlTokens, Encode, any_of
from tessera.chat.end_tokens import named_end_tokens
from tessera.chat.rows import Answered, EncodedExample, Prompts, borders_of, rows_of
from tessera.chat.template import ChatTemplate
from tessera.chat.tokenizer import load_tokenizer
from tessera.data.examples import Example
from tessera.errors import InvalidInput
from tessera.model.encoders import find_encoder
from tessera.model.files import model_folder

__all__ = ["ChatFormat", "EncodedExample", "load_chat_format"]

#: Longer texts have at least two tokens.
MAX_CHARS_OF_A_TOKEN = 128
#: Texts to put before another one, for tokenizers that put a space before the first word of a text.
_ANCHORS = ("\n", "a", ".", ":")


@dataclass(frozen=True)
class LabelledIds:
    """The tokens of a text to be classified, or of two."""

    token_ids: list[int]
    #: Of two texts for an encoder: the tokens before the second one; otherwise 0.
    first_length: int
    is_truncated: bool


class ChatFormat:
    """The token ids of prompts and examples for one tokenizer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        allow_control_tokens: bool = False,
        is_encoder: bool = False,
    ) -> None:
        """eos_token_ids: the end tokens in the model's files.

        allow_control_tokens: let control tokens that are typed in messages act as such. is_encoder: the base
        model classifies texts and generates none.
        """
        self.tokenizer = tokenizer
        self.is_encoder = is_encoder
        self._template = ChatTemplate(tokenizer)
        shape = self._template.shape
        self._control = None if allow_control_tokens else ControlTokens(tokenizer, shape)
        added = tokenizer.added_tokens_decoder
        self._added = re.compile(f"({any_of(token.content for token in added.values())})")
        self._borders = borders_of(list(added.values()), shape.written)
        self._head = self._tokens_put_first()
        self._puts_space_first = self._ids("x") != self._after("\n", "x", self._ids)
        named = list(eos_token_ids)
        eos = tokenizer.eos_token_id
        #: The token that ends a text or a completion.
        self.text_end = eos if eos is not None else named[0] if named else None
        special = {*tokenizer.all_special_ids, *named, *(i for i, token in added.items() if token.special)}
        #: The token that ends an answer, in training and in serving; None if there is none.
        self.turn_end = self._find_turn_end(special)
        ends = (eos, self.text_end, self.turn_end)
        #: The tokens at which a generation stops by itself, including `turn_end` and `text_end`.
        self.end_ids = tuple(sorted({*named, *(int(end) for end in ends if end is not None)}))

    @property
    def has_template(self) -> bool:
        return self._template.exists

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """The names that `variables` of `prompt_ids` may contain: those that the template reads."""
        return self._template.variables

    def at(self, moment: datetime) -> ChatFormat:
        """Return a copy whose template sees `moment` as the date."""
        fixed = copy(self)
        fixed._template = self._template.at(moment)
        return fixed

    def prompt_ids(
        self, messages: Sequence[Mapping[str, Any]], *, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the ids of a conversation, including the opening of the assistant's next turn.

        variables: values for names in `template_variables`. Raises `InvalidInput` if the base model has no
        chat template, or if the template refuses the messages.
        """
        marked, variables, encode = self._marked(messages, variables)
        return encode(self._template.render(marked, add_generation_prompt=True, variables=variables))

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of plain text, with the special tokens that the tokenizer puts before a text.

        Those are not added if the text already begins with them. An empty text gives the start token, if the
        tokenizer has one. Raises `InvalidInput`.
        """
        ids = self._ids(text)
        if ids[: len(self._head)] != self._head:
            ids = self._head + ids
        bos = self.tokenizer.bos_token_id
        return ids if ids or bos is None else [bos]

    def labelled_ids(
        self, text: str, text_pair: str | None = None, *, max_tokens: int | None = None
    ) -> LabelledIds:
        """Return the ids of a text to be classified, or of two. max_tokens: a longer text loses its end.

        For a causal model two texts are one with a line break between them, and no end token follows: the
        head reads the state of the last token of the text. For an encoder the tokenizer adds its special
        tokens, and of two texts the longer one is shortened. Special tokens that are typed in a text for an
        encoder are plain text. Raises `InvalidInput`.
        """
        if self.is_encoder:
            return self._encoder_ids(text, text_pair, max_tokens)
        ids = self.text_ids(text if text_pair is None else f"{text}\n{text_pair}")
        is_truncated = max_tokens is not None and len(ids) > max_tokens
        return LabelledIds(ids[:max_tokens], 0, is_truncated)

    def _encoder_ids(self, text: str, text_pair: str | None, max_tokens: int | None) -> LabelledIds:
        encoded = self.tokenizer(
            text,
            text_pair,
            add_special_tokens=True,
            split_special_tokens=True,
            truncation=max_tokens is not None,
            max_length=max_tokens,
            return_overflowing_tokens=max_tokens is not None,
            verbose=False,
        )
        rows = encoded.encodings
        assert rows is not None
        first_length = 0
        if text_pair is not None:  # special tokens belong to no text: the second begins with its first own
            first_length = next((i for i, own in enumerate(rows[0].sequence_ids) if own == 1), 0)
        return LabelledIds(list(rows[0].ids), first_length, len(rows) > 1)

    def text_spans(self, text: str) -> list[tuple[int, int]]:
        """Return the characters [start, end) of the text for each of its `text_ids`."""
        spans = self.tokenizer(text, verbose=False, add_special_tokens=False, return_offsets_mapping=True)
        own: list[tuple[int, int]] = spans["offset_mapping"]
        return [(0, 0)] * (len(self.text_ids(text)) - len(own)) + own

    def encode_rows(self, example: Example, *, max_tokens: int) -> list[EncodedExample]:
        """Return the training rows of an example of any kind, each at most `max_tokens` (>= 2) long.

        There is one row per learned answer, except that a row that begins with another one replaces it
        (`rows_of`). A row that is too long keeps the end of its prompt and the beginning of its answer.
        Raises `InvalidInput` if the template refuses the example, or if no token is left to learn.
        """
        if example.messages is not None:
            answered = list(self._conversation(example.messages))
        elif example.completion is not None:
            ids = self._continuation(example.completion, self._ids)
            learned = self._ended(ids, example.completion, self.text_end)
            answered = [Answered(self.text_ids(example.prompt or ""), learned)]
        else:
            text = example.text or ""
            ids = self._ended(self.text_ids(text), text, self.text_end)
            answered = [Answered(ids[:1], ids[1:])]
        rows = rows_of(answered, max_tokens=max_tokens, bos=self.tokenizer.bos_token_id)
        if not any(row.num_loss_tokens for row in rows):
            raise InvalidInput("the example has no token to learn", code="nothing_trained")
        return rows

    def check(self, example: Example) -> None:
        """Raise `InvalidInput` for an example that `encode_rows` would refuse.

        For a conversation, only the first learned answer after each role and the last one are
        tried: a template that accepts these accepts the ones between them. Encoding can fail only for typed
        control tokens.
        """
        if (messages := example.messages) is not None:
            learned = self._learned(messages)
            after = {messages[index - 1]["role"]: index for index in reversed(learned)}
            for index in {*after.values(), learned[-1]}:
                text, encode = self._render(messages[:index], None)
                if encode != self._ids:
                    encode(text)
            for text in (messages[index]["content"] for index in learned):
                if self._control and self._control.mark_answer(text):
                    self._answer(text)
        elif self.text_end is None or len(example.completion or example.text or "") <= MAX_CHARS_OF_A_TOKEN:
            self.encode_rows(example, max_tokens=8)

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[Answered]:
        """Yield the prompt and the answer of every learned message."""
        learned = self._learned(messages)
        prompts = Prompts(self._borders if len(learned) > 1 else ())
        marked, _, encode = self._marked(messages, None)
        for index in learned:
            text = self._template.render(marked[:index], add_generation_prompt=True)
            answer = self._answer(messages[index]["content"])
            yield Answered(prompts.ids(text, encode), answer)

    def _learned(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the indices of learned messages: the assistant's, except those with weight 0 and greetings.

        A greeting is a message that no prompt leads to: the chat endpoint sends none for the first message of
        a conversation, and many templates render none before the first user message. It is context only.
        Raises `InvalidInput` if no message is left.
        """
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
        learned = [i for i in answers if i > 0 and self._is_asked(messages[:i])]
        if answers and not learned:
            raise InvalidInput(
                "nothing comes before the assistant's only message, so no prompt leads to it: "
                'begin with a user message, or write the text as {"text": …}',
                code="nothing_trained",
            )
        if not learned:
            raise InvalidInput("no assistant message has weight 1", code="nothing_trained")
        return learned

    def _is_asked(self, before: Sequence[Mapping[str, Any]]) -> bool:
        if any(message["role"] == "user" for message in before):
            return True
        try:
            self._render(before, None)
        except InvalidInput as error:
            if error.code == "no_chat_template":
                raise
            return False
        return True

    def _answer(self, text: str) -> list[int]:
        """Return the ids that the model should generate for `text`.

        A tag that the template has already opened (`<think>`) is not repeated.
        """
        tag, gap = self._template.shape.opened
        if tag and text.startswith(tag):
            text = text.removeprefix(tag).removeprefix(gap)
        marked = self._control.mark_answer(text) if self._control else None
        if marked is None:
            return self._ended(self._continuation(text, self._ids), text, self.turn_end)
        return [*self._continuation(*marked), *([] if self.turn_end is None else [self.turn_end])]

    def _continuation(self, text: str, encode: Encode) -> list[int]:
        """Return the ids of a text that continues another one.

        Some tokenizers put a space before the first word of a text, or of every piece between added tokens.
        These spaces are left out here.
        """
        if not self._puts_space_first:
            return encode(text)
        pieces = [piece for piece in self._added.split(text) if piece]
        return [token for piece in pieces for token in self._piece(piece, encode)]

    def _piece(self, text: str, encode: Encode) -> list[int]:
        """Return the ids of an added token, or of a text between two added tokens."""
        for anchor in () if self._added.fullmatch(text) else _ANCHORS:
            ids = self._after(anchor, text, encode)
            if ids is not None:
                return ids
        return encode(text)

    def _after(self, anchor: str, text: str, encode: Encode) -> list[int] | None:
        """Return the ids of `text` after `anchor`, or None if the two merge."""
        before, both = encode(anchor), encode(anchor + text)
        return both[len(before) :] if both[: len(before)] == before else None

    def _ended(self, ids: list[int], text: str, end: int | None) -> list[int]:
        """Append an end token, unless `text` ends with one (possibly followed by white space)."""
        last = self._ids(text.rstrip())[-1:] if text[-1:].isspace() else ids[-1:]
        return ids if end is None or (last and last[0] in self.end_ids) else [*ids, end]

    def _render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None
    ) -> tuple[str, Encode]:
        """Return the text of a prompt, and the function that encodes it. Raises `InvalidInput`."""
        marked, variables, encode = self._marked(messages, variables)
        return self._template.render(marked, add_generation_prompt=True, variables=variables), encode

    def _marked(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None
    ) -> tuple[list[dict[str, Any]], Mapping[str, Any], Encode]:
        """Return messages and variables as the template gets them, and the encoder of the rendering."""
        shown = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
        if self._control is None:
            return shown, variables or {}, self._ids
        return self._control.mark(shown, variables or {}, self._ids)

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Encode the text as it is, including the control tokens in it. Raises `InvalidInput`."""
        try:
            encoded = self.tokenizer(text, verbose=False, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidInput(f"the text cannot be tokenised: {error}") from error
        return list(encoded["input_ids"])

    def _tokens_put_first(self) -> list[int]:
        """Return the special tokens that the tokenizer itself puts before a text."""
        plain, whole = self._ids("x"), self._ids("x", add_special_tokens=True)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start]
        return []

    def _find_turn_end(self, special: set[int]) -> int | None:
        """Find the token that the template writes after an answer; else the one that ends a text.

        A special token is preferred to another added one, because `</answer>` may come before `<|im_end|>`.
        Some templates (Qwen1.5's) do not close the last turn. Then it is the token between an answer and the
        next question, unless that is a token that begins a turn.
        """
        shape = self._template.shape
        if ends := self._added_in(shape.tail, special):
            return ends[0]
        bos = self.tokenizer.bos_token_id
        begun = [i for i in self._added_in(shape.first, special) if i != bos]
        ends = self._added_in(shape.between, special)
        return ends[0] if ends and ends[0] not in (bos, *begun[:1], *begun[-1:]) else self.text_end

    def _added_in(self, text: str, special: set[int]) -> list[int]:
        """Return the added tokens in a text that are not white space, special ones first."""
        added = {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items()}
        ids = [i for i in self._ids(text) if (i in special or i in added) and not added.get(i, "x").isspace()]
        return sorted(ids, key=lambda token_id: token_id not in special)


def load_chat_format(
    source: str | Path, *, revision: str | None = None, allow_control_tokens: bool = False
) -> ChatFormat:
    """Load the chat format of a base model, with the end tokens of its files. Raises `UnsupportedModel`."""
    return ChatFormat(
        load_tokenizer(source, revision=revision),
        eos_token_ids=named_end_tokens(model_folder(source, revision=revision)),
        allow_control_tokens=allow_control_tokens,
        is_encoder=find_encoder(model_folder(source, revision=revision)) is not None,
    )
