"""The chat template of a base model: rendering messages as text, and finding what it writes around an answer.

transformers renders the template. Only a template that uses the date is rendered here, so that the date can
be fixed. This module knows no tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from tessera.chat.template_names import names_read
from tessera.errors import InvalidInput

#: Errors of a jinja template on messages that it was not written for.
_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
#: A tag at the end of a generation prompt: `<think>`, `[THINK]`.
_OPENED = re.compile(r"(<\w+>|\[\w+\])(\s*)$")
_QUESTION, _ANSWER = "Quince?", "Zucchini!"


@dataclass(frozen=True)
class TurnShape:
    """The text that a template writes around an answer, as observed in small conversations."""

    tail: str = ""  # after an answer that is the last message
    between: str = ""  # after an answer, up to the next question
    first: str = ""  # before the first question
    #: The tag at the end of the answer's prompt, and the white space after it.
    opened: tuple[str, str] = ("", "")
    asked: str = ""  # a rendering of questions only
    written: str = ""  # everything that the template may write


class ChatTemplate:
    """The chat template of one tokenizer, which may have none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template or ""
        self._source = template.get("default", "") if isinstance(template, dict) else template
        self.exists = bool(self._source)
        self._now: Callable[[], datetime] = datetime.now

    def at(self, moment: datetime) -> ChatTemplate:
        """Return a copy of the template with `moment` as its fixed date."""
        fixed = copy(self)
        fixed._now = lambda: moment
        return fixed

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render the conversation as text. variables: more names for the template. Raises `InvalidInput`."""
        if not self.exists:
            raise InvalidInput(
                "the base model has no chat template; use plain prompts, prompt/completion or text examples",
                param="messages",
                code="no_chat_template",
            )
        try:
            if "strftime_now" in self._source:
                return self._render_dated(messages, add_generation_prompt, variables or {})
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(variables or {}),
            )
        except _TEMPLATE_FAULTS as error:
            raise InvalidInput(
                f"the chat template of the base model refuses these messages: {error}",
                param="messages",
                code="invalid_messages",
            ) from error
        return str(text)

    def _render_dated(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """Render like transformers, but with our clock: transformers accepts no functions for a template."""
        return str(
            _compile_jinja_template(self._source).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=lambda form: self._now().strftime(form),
                **{**self._tokenizer.special_tokens_map, **variables},
            )
        )

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and that a caller may give a value.

        This excludes the parts of every conversation, the tokenizer's tokens, and arguments of the rendering.
        """
        environment = _compile_jinja_template(self._source).environment
        read = names_read(environment.parse(self._source))
        arguments = inspect.signature(self._tokenizer.apply_chat_template).parameters
        tokens = (*self._tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *self._tokenizer.special_tokens_map)
        return read - {"messages", "strftime_now", *environment.globals, *arguments, *tokens}

    @cached_property
    def shape(self) -> TurnShape:
        """The text that this template writes around an answer."""
        user, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        system = {"role": "system", "content": _QUESTION}
        for before in ([user], [system, user]):
            try:
                prompt = self.render(before, add_generation_prompt=True)
                whole = self.render([*before, answer])
            except InvalidInput:
                continue
            _, found, tail = whole.rpartition(_ANSWER)
            opened = _OPENED.search(prompt.rpartition(_QUESTION)[2])
            longer = ([*before, answer, *before[-1:]], [{**before[0], "role": "system"}, *before[-1:]])
            longer_texts = list(map(self._try_render, longer))
            written = "".join([self._source, prompt, whole, *longer_texts])
            return TurnShape(
                tail if found else "",
                longer_texts[0].rpartition(_ANSWER)[2].partition(_QUESTION)[0],
                prompt.partition(_QUESTION)[0],
                (opened[1], opened[2]) if opened else ("", ""),
                self._try_render(before),
                written,
            )
        return TurnShape(written=self._source)

    def _try_render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render the messages; empty if the template refuses them."""
        try:
            return self.render(messages)
        except InvalidInput:
            return ""
