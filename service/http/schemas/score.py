"""Request and response of /v1/score: the log-probability of given texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from service.http.schemas.common import (
    AdapterUsed,
    Answer,
    Measured,
    ModelRequest,
    Request,
    UsageReport,
    wrong_field,
)
from service.http.schemas.generation import MAX_MESSAGES, ChatMessage
from tessera.data.examples import Example

MAX_ITEMS = 64


def _whole(value: Any) -> Any:
    """1.0 is 1, as in a training file."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class ScoredMessage(ChatMessage):
    """A message as the chat endpoint takes it, and whether it counts for the score."""

    weight: Annotated[int | None, BeforeValidator(_whole)] = Field(
        None, ge=0, le=1, description="Of an assistant message: 1 (the default) counts it, 0 does not."
    )

    @model_validator(mode="after")
    def _check_weight(self) -> ScoredMessage:
        if self.weight and self.role != "assistant":
            raise wrong_field(self, "weight", "only assistant messages are counted; remove the weight here")
        return self

    def to_template(self) -> dict[str, Any]:
        weighed = {} if self.weight is None else {"weight": self.weight}
        return {**super().to_template(), **weighed}


class Conversation(Request):
    """A conversation. The assistant's messages are counted."""

    messages: list[ScoredMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)


class PromptAndCompletion(Request):
    """A prompt and its completion. The completion is counted."""

    prompt: str
    completion: str = Field(min_length=1)


class PromptAndAnswer(Request):
    """A prompt and its completion as messages, TRL's form. The assistant's messages of the completion are
    counted."""

    prompt: list[ScoredMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    completion: list[ScoredMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)

    def to_messages(self) -> tuple[dict[str, Any], ...]:
        prompt = (message.to_template() for message in self.prompt)
        context = ({**m, "weight": 0} if m["role"] == "assistant" else m for m in prompt)
        return (*context, *(message.to_template() for message in self.completion))


class PlainText(Request):
    """A text. All tokens are counted except the first, which nothing predicts."""

    text: str = Field(min_length=1)


def _kind_of_item(value: Any) -> str:
    given = value if isinstance(value, dict) else {}
    keys = {key for key in ("messages", "text") if given.get(key) is not None}
    if keys:
        return "~conversation" if "messages" in keys else "~plain"
    return "~turns" if isinstance(given.get("prompt"), list) else "~pair"


ScoreItem = Annotated[
    Annotated[Conversation, Tag("~conversation")]
    | Annotated[PromptAndCompletion, Tag("~pair")]
    | Annotated[PromptAndAnswer, Tag("~turns")]
    | Annotated[PlainText, Tag("~plain")],
    Discriminator(_kind_of_item),
]


class ScoreRequest(ModelRequest):
    """Texts to score, in the forms of a training file."""

    input: list[ScoreItem] = Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
    return_tokens: bool = Field(False, description="Also return every token with its log-probability.")

    def examples(self) -> list[Example]:
        return [_to_example(item, number) for number, item in enumerate(self.input, start=1)]


def _to_example(
    item: Conversation | PromptAndCompletion | PromptAndAnswer | PlainText, number: int
) -> Example:
    if isinstance(item, Conversation):
        return Example(messages=tuple(m.to_template() for m in item.messages), line=number)
    if isinstance(item, PromptAndAnswer):
        return Example(messages=item.to_messages(), line=number)
    if isinstance(item, PromptAndCompletion):
        return Example(prompt=item.prompt, completion=item.completion, line=number)
    return Example(text=item.text, line=number)


class ScoredToken(Answer):
    """One token after the first."""

    token: str
    token_id: int
    logprob: float = Field(description="In nats, given all tokens before it.")
    is_counted: bool


class Score(Answer):
    """The score of one item."""

    index: int
    num_tokens: int = Field(description="Number of counted tokens.")
    sum_logprob: float
    loss: float = Field(description="Mean negative log-probability of the counted tokens, in nats.")
    tokens: list[ScoredToken] | None = None


class ScoreReport(Answer):
    """The scores of all items."""

    object: Literal["list"] = "list"
    model: str
    data: list[Score]
    loss: float = Field(description="Over the counted tokens of all items together.")
    usage: UsageReport
    adapter: AdapterUsed | None
    x_tessera: Measured
