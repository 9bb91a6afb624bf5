"""From messages and examples to token ids, by the tokenizer's own chat template.

The service and the trainer must agree on every token, so both ask this one class. Knows neither a model nor a
file.

What is trained is what serving sees: for every answer the ids of its prompt, exactly as the chat endpoint
sends them, and then what the model has to generate: the answer's text as its author wrote it, tokenised
apart, and the token that ends a turn. See `docs/training-data.md`, "What is learned".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
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
from tessera.model.files import model_folder

__all__ = ["ChatFormat", "EncodedExample", "load_chat_format"]

#: Longer texts have at least two tokens.
MAX_CHARS_OF_A_TOKEN = 128
#: What a text is shown to the tokenizer after, if it puts a space before the first word of a text.
_ANCHORS = ("\n", "a", ".", ":")


class ChatFormat:
    """The token ids of prompts and examples for one tokenizer.

    turn_end: the token that ends an answer, in training and in serving; None if there is none.
    text_end: the token that ends a text or a completion.
    end_ids: the tokens at which a generation stops by itself, `turn_end` and `text_end` among them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        allow_control_tokens: bool = False,
    ) -> None:
        """eos_token_ids: what the model's files name. allow_control_tokens: those typed in messages act."""
        self.tokenizer = tokenizer
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
        self.text_end = eos if eos is not None else named[0] if named else None
        special = {*tokenizer.all_special_ids, *named, *(i for i, token in added.items() if token.special)}
        self.turn_end = self._find_turn_end(special)
        ends = (eos, self.text_end, self.turn_end)
        self.end_ids = tuple(sorted({*named, *(int(end) for end in ends if end is not None)}))

    @property
    def has_template(self) -> bool:
        return self._template.exists

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """The names that `variables` of `prompt_ids` may have: those that the template reads."""
        return self._template.variables

    def at(self, moment: datetime) -> ChatFormat:
        """The same, but the date that a template may ask for is always that of `moment`."""
        fixed = copy(self)
        fixed._template = self._template.at(moment)
        return fixed

    def prompt_ids(
        self, messages: Sequence[Mapping[str, Any]], *, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """A conversation up to and with the opening of the assistant's next turn.

        variables: by the names in `template_variables`. Raises `InvalidInput` if the base
        model has no chat template or the template refuses the messages.
        """
        text, encode = self._render(messages, variables)
        return encode(text)

    def text_ids(self, text: str) -> list[int]:
        """Plain text with the special tokens that the tokenizer puts in front, if they do not stand there.

        An empty text is one start token, if the tokenizer has one. Raises `InvalidInput`.
        """
        ids = self._ids(text)
        if ids[: len(self._head)] != self._head:
            ids = self._head + ids
        bos = self.tokenizer.bos_token_id
        return ids if ids or bos is None else [bos]

    def text_spans(self, text: str) -> list[tuple[int, int]]:
        """For each of `text_ids` the characters [start, end) of the text that it stands for."""
        spans = self.tokenizer(text, verbose=False, add_special_tokens=False, return_offsets_mapping=True)
        own: list[tuple[int, int]] = spans["offset_mapping"]
        return [(0, 0)] * (len(self.text_ids(text)) - len(own)) + own

    def encode_rows(self, example: Example, *, max_tokens: int) -> list[EncodedExample]:
        """The training rows of an example of any kind, each at most `max_tokens` (>= 2) long.

        One row per learned answer, but for answers whose rows begin alike: they share one (`rows_of`). Of a
        row that is too long the end of the prompt and the beginning of the answer are kept. Raises
        `InvalidInput` if the template refuses it or no token is left to learn.
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
        """Raise `InvalidInput` for what `encode_rows` would refuse.

        Of a conversation the first learned answer after every role is tried, and the last one: a template
        that takes these takes what comes between. Only what is typed as a control token may fail to encode.
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
        """The prompt and the answer of every learned message."""
        learned = self._learned(messages)
        prompts = Prompts(self._borders if len(learned) > 1 else ())
        marked, _, encode = self._marked(messages, None)
        for index in learned:
            text = self._template.render(marked[:index], add_generation_prompt=True)
            answer = self._answer(messages[index]["content"])
            yield Answered(prompts.ids(text, encode), answer)

    def _learned(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Which messages are learned: the assistant's, without those of weight 0 and those nothing asks for.

        The chat endpoint sends no prompt that a conversation's first message could answer, and many templates
        none before the user has spoken. Such a greeting is context. Raises `InvalidInput` if none is left.
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
        """Ids of what the model is to generate as `text`.

        A tag that the template has opened already (`<think>`) is not opened again.
        """
        tag, gap = self._template.shape.opened
        if tag and text.startswith(tag):
            text = text.removeprefix(tag).removeprefix(gap)
        marked = self._control.mark_answer(text) if self._control else None
        if marked is None:
            return self._ended(self._continuation(text, self._ids), text, self.turn_end)
        return [*self._continuation(*marked), *([] if self.turn_end is None else [self.turn_end])]

    def _continuation(self, text: str, encode: Encode) -> list[int]:
        """Ids of a text that goes on after another one: without the spaces that some tokenizers put.

        They put one before the first word of a text, or of every piece between added tokens.
        """
        if not self._puts_space_first:
            return encode(text)
        pieces = [piece for piece in self._added.split(text) if piece]
        return [token for piece in pieces for token in self._piece(piece, encode)]

    def _piece(self, text: str, encode: Encode) -> list[int]:
        """Ids of an added token, or of a text between two."""
        for anchor in () if self._added.fullmatch(text) else _ANCHORS:
            ids = self._after(anchor, text, encode)
            if ids is not None:
                return ids
        return encode(text)

    def _after(self, anchor: str, text: str, encode: Encode) -> list[int] | None:
        """Ids of `text` where it follows `anchor`; None if the two merge."""
        before, both = encode(anchor), encode(anchor + text)
        return both[len(before) :] if both[: len(before)] == before else None

    def _ended(self, ids: list[int], text: str, end: int | None) -> list[int]:
        """The ids of `text` and an end token, unless one stands at its end (white space may follow)."""
        last = self._ids(text.rstrip())[-1:] if text[-1:].isspace() else ids[-1:]
        return ids if end is None or (last and last[0] in self.end_ids) else [*ids, end]

    def _render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None
    ) -> tuple[str, Encode]:
        """The text of a prompt, and what makes ids of it. Raises `InvalidInput`."""
        marked, variables, encode = self._marked(messages, variables)
        return self._template.render(marked, add_generation_prompt=True, variables=variables), encode

    def _marked(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None
    ) -> tuple[list[dict[str, Any]], Mapping[str, Any], Encode]:
        """What a template is shown of messages and variables, and what makes ids of their rendering."""
        shown = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
        if self._control is None:
            return shown, variables or {}, self._ids
        return self._control.mark(shown, variables or {}, self._ids)

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The text as it is, with the tokens that are written in it. Raises `InvalidInput`."""
        try:
            encoded = self.tokenizer(text, verbose=False, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidInput(f"the text cannot be tokenised: {error}") from error
        return list(encoded["input_ids"])

    def _tokens_put_first(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text by itself."""
        plain, whole = self._ids("x"), self._ids("x", add_special_tokens=True)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start]
        return []

    def _find_turn_end(self, special: set[int]) -> int | None:
        """The token that the template writes after an answer, or else the one that ends a text.

        A special token goes before another added one: `</answer>` may stand before `<|im_end|>`. Some
        templates leave the end of the last turn open (Qwen1.5's). Then it is what stands between an answer
        and the next question, if that is no token with which a turn begins.
        """
        shape = self._template.shape
        if ends := self._added_in(shape.tail, special):
            return ends[0]
        bos = self.tokenizer.bos_token_id
        begun = [i for i in self._added_in(shape.first, special) if i != bos]
        ends = self._added_in(shape.between, special)
        return ends[0] if ends and ends[0] not in (bos, *begun[:1], *begun[-1:]) else self.text_end

    def _added_in(self, text: str, special: set[int]) -> list[int]:
        """The added tokens in a text that are not white space, the special ones first."""
        added = {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items()}
        ids = [i for i in self._ids(text) if (i in special or i in added) and not added.get(i, "x").isspace()]
        return sorted(ids, key=lambda token_id: token_id not in special)


def load_chat_format(
    source: str | Path, *, revision: str | None = None, allow_control_tokens: bool = False
) -> ChatFormat:
    """The chat format of a base model, with the end tokens that its files name. Raises `UnsupportedModel`."""
    return ChatFormat(
        load_tokenizer(source, revision=revision),
        eos_token_ids=named_end_tokens(model_folder(source, revision=revision)),
        allow_control_tokens=allow_control_tokens,
    )
