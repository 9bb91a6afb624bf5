"""From messages and examples to token ids, by the tokenizer's own chat template.

The service and the trainer must agree on every token of a prompt, so both ask this one class. Knows neither a
model nor a file. What is trained is said by a mask over the tokens: the assistant's text and the token that
ends its turn, never the words of the user.

Where a template marks what the assistant generates (`{% generation %}`), the marks decide. Elsewhere the span
of an assistant message is what its rendering adds to the rendering of the prompt before it, which is right
only if the template is *prefix preserving*: a longer conversation begins with the text of the shorter one.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapter_core.errors import InvalidInput
from adapter_core.examples import Example

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

#: Of a text that is too long, this part of the limit may be prompt: a completion without its question would
#: train on noise.
PROMPT_SHARE = 0.25


@dataclass(frozen=True)
class EncodedExample:
    """token_ids [T]; loss_mask [T]: which tokens are learned (never the first: nothing predicts it).

    truncated: the example was longer than the limit, and tokens were left out.
    """

    token_ids: list[int]
    loss_mask: list[bool]
    truncated: bool = False

    @property
    def num_loss_tokens(self) -> int:
        return sum(self.loss_mask)


class ChatFormat:
    """The token ids of prompts and examples for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        template = tokenizer.chat_template or ""
        text = template.get("default", "") if isinstance(template, dict) else template
        self._has_marks = _GENERATION.search(text) is not None
        added = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """A conversation up to and with the opening of the assistant's next turn.

        Raises `InvalidInput` if the base model has no chat template or the template refuses the messages.
        """
        return self._ids(self._render(messages, add_generation_prompt=True))

    def text_ids(self, text: str) -> list[int]:
        """Plain text as the tokenizer encodes it by itself, with the special tokens that it puts in front.

        An empty text is one start token, if the tokenizer has one. Raises `InvalidInput`.
        """
        ids: list[int] = self._encode(text, add_special_tokens=True)["input_ids"]
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        while len(ids) > 1 and ids[-1] == eos:
            ids = ids[:-1]
        return ids if ids or bos is None else [bos]

    def encode_pair(self, prompt: str, completion: str) -> EncodedExample:
        """Plain prompt and completion, the mask on the completion's tokens, no end token added.

        The two are tokenised apart, as they are when the model continues the prompt. Raises `InvalidInput`.
        """
        prompt_ids, completion_ids = self.text_ids(prompt), self._ids(completion)
        mask = [False] * len(prompt_ids) + [True] * len(completion_ids)
        return EncodedExample(prompt_ids + completion_ids, [False, *mask[1:]])

    def encode_example(self, example: Example, *, max_tokens: int) -> EncodedExample:
        """An example of any kind; at most `max_tokens` (>= 2) long.

        Of one that is too long the end of the prompt and the beginning of the completion are kept. Raises
        `InvalidInput` if the template refuses it or no token is left to learn.
        """
        if example.messages is not None:
            ids, mask = self._conversation(example.messages)
        elif example.completion is not None:
            pair = self.encode_pair(example.prompt or "", example.completion)
            ids, mask = [*pair.token_ids, *self._end()], [*pair.loss_mask, *[True] * len(self._end())]
        else:
            ids = self.text_ids(example.text or "")
            mask = [True] * len(ids)
        encoded = self._truncate(ids, [False, *mask[1:]], max_tokens)
        if not encoded.num_loss_tokens:
            raise InvalidInput("the example has no token to learn", code="nothing_trained")
        return encoded

    def _conversation(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """Token ids and mask of a conversation, before truncation."""
        weights = [message.get("weight", 1) for message in messages]
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        assistant = [index for index, message in enumerate(plain) if message["role"] == "assistant"]
        marked = self._marked_spans(plain) if self._has_marks else None
        if marked is not None and len(marked[1]) == len(assistant):
            ids, spans = marked
        else:
            ids, spans = self._prefix_spans(plain, assistant)
        mask = [False] * len(ids)
        for (start, end), index in zip(spans, assistant, strict=True):
            if weights[index]:
                end = self._with_turn_end(ids, mask, start, end)
                mask[start:end] = [True] * (end - start)
        return ids, mask

    def _marked_spans(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the [start, end) runs of tokens between the template's generation marks."""
        try:
            with _RENDERING:
                encoded = self.tokenizer.apply_chat_template(
                    messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
                )
        except _TEMPLATE_FAULTS as error:
            raise _refused(error) from error
        ids, marks = list(encoded["input_ids"]), [0, *encoded["assistant_masks"], 0]
        starts = [i for i in range(len(ids)) if marks[i + 1] and not marks[i]]
        ends = [i + 1 for i in range(len(ids)) if marks[i + 1] and not marks[i + 2]]
        return ids, list(zip(starts, ends, strict=True))

    def _prefix_spans(
        self, messages: list[dict[str, Any]], assistant: list[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the runs that the assistant messages add. Raises `InvalidInput`: template unfit."""
        if not self.tokenizer.is_fast:
            raise InvalidInput("chat examples need a fast tokenizer (character offsets)", param="messages")
        text = self._render(messages)
        encoded = self._encode(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        spans = []
        for index in assistant:
            before = self._render(messages[:index], add_generation_prompt=True)
            after = self._render(messages[: index + 1])
            if not after.startswith(before) or not text.startswith(after):
                raise InvalidInput(
                    "the chat template is not prefix preserving: a conversation's text does not begin with "
                    f"that of its first {index + 1} message(s), so what to learn cannot be told; "
                    "use single-turn examples, or a template with {% generation %} marks",
                    param="messages",
                    code="template_not_prefix_preserving",
                )
            inside = [i for i, (a, b) in enumerate(offsets) if b > len(before) and a < len(after)]
            spans.append((inside[0], inside[-1] + 1) if inside else (0, 0))
        return list(encoded["input_ids"]), spans

    def _with_turn_end(self, ids: list[int], mask: list[bool], start: int, end: int) -> int:
        """The end of an assistant's run [start, end), moved so that the token that ends the turn is learned.

        A model that never learns it would never stop. Appends the tokenizer's end token (to `ids` and `mask`)
        if the template closes the last turn with none.
        """
        if any(token in self._special for token in ids[max(start, end - 2) : end]):
            return end
        if end < len(ids):
            return end + 1 if ids[end] in self._special else end
        ids += self._end()
        mask += [False] * len(self._end())
        return len(ids)

    def _truncate(self, ids: list[int], mask: list[bool], max_tokens: int) -> EncodedExample:
        if len(ids) <= max_tokens:
            return EncodedExample(ids, mask)
        first = mask.index(True) if True in mask else len(ids)
        room = max(1, max_tokens - (len(ids) - first), int(max_tokens * PROMPT_SHARE))
        cut = max(0, first - room)
        head = [ids[0]] if cut and ids[0] == self.tokenizer.bos_token_id and room > 1 else []
        cut += len(head)
        ids, mask = head + ids[cut:], [False] * len(head) + mask[cut:]
        return EncodedExample(ids[:max_tokens], mask[:max_tokens], truncated=True)

    def _end(self) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else [eos]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._encode(text, add_special_tokens=False)["input_ids"]
        return ids

    def _encode(self, text: str, **options: Any) -> Any:
        try:
            return self.tokenizer(text, verbose=False, **options)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidInput(f"the text cannot be tokenised: {error}") from error

    def _render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises `InvalidInput`."""
        if not self.has_template:
            raise InvalidInput(
                "the base model has no chat template; use plain prompts, prompt/completion or text examples",
                param="messages",
                code="no_chat_template",
            )
        try:
            with _RENDERING:
                text = self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
        except _TEMPLATE_FAULTS as error:
            raise _refused(error) from error
        return str(text)


#: transformers shares one compiled template, and in it one record of the marks, between all threads: two
#: renderings at once fail, or mark each other's tokens.
_RENDERING = threading.Lock()

#: What a jinja template does with messages that it was not written for.
_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


def _refused(error: Exception) -> InvalidInput:
    message = f"the chat template of the base model refuses these messages: {error}"
    return InvalidInput(message, param="messages", code="invalid_messages")
