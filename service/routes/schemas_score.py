"""Request and answer of /v1/score: how likely a model finds given texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from adapter_core.examples import Example
from service.routes.schemas import (
    AdapterUsed,
    Answer,
    Measured,
    ModelRequest,
    Strict,
    UsageReport,
)
from service.routes.schemas_generation import ChatMessage

MAX_ITEMS = 64


class ScoredMessage(ChatMessage):
    weight: Annotated[int, Field(ge=0, le=1)] = Field(1, description="0: not counted (assistant messages)")


class Conversation(Strict):
    """Counted: what the assistant says."""

    messages: list[ScoredMessage] = Field(min_length=1, max_length=2048, fail_fast=True)


class PromptAndCompletion(Strict):
    """Counted: the completion."""

    prompt: str
    completion: str = Field(min_length=1)


class PlainText(Strict):
    """Counted: all but the first token, which nothing predicts."""

    text: str = Field(min_length=1)


def _kind_of_item(value: Any) -> str:
    keys = value if isinstance(value, dict) else {}
    return "~conversation" if "messages" in keys else "~plain" if "text" in keys else "~pair"


Item = Annotated[
    Annotated[Conversation, Tag("~conversation")]
    | Annotated[PromptAndCompletion, Tag("~pair")]
    | Annotated[PlainText, Tag("~plain")],
    Discriminator(_kind_of_item),
]


class ScoreRequest(ModelRequest):
    """Texts to be scored, in the three forms of a training file."""

    input: list[Item] = Field(min_length=1, max_length=MAX_ITEMS)
    return_tokens: bool = Field(False, description="also list every token with its log-probability")

    def examples(self) -> list[Example]:
        return [_to_example(item, number) for number, item in enumerate(self.input, start=1)]


def _to_example(item: Conversation | PromptAndCompletion | PlainText, number: int) -> Example:
    if isinstance(item, Conversation):
        return Example(
            messages=tuple({**message.to_template(), "weight": message.weight} for message in item.messages),
            line=number,
        )
    if isinstance(item, PromptAndCompletion):
        return Example(prompt=item.prompt, completion=item.completion, line=number)
    return Example(text=item.text, line=number)


class ScoredToken(Answer):
    """One token after the first; logprob: in nats, given all tokens before it."""

    token: str
    token_id: int
    logprob: float
    is_counted: bool


class Score(Answer):
    """num_tokens: counted ones. loss: their mean negative log-probability in nats."""

    index: int
    num_tokens: int
    sum_logprob: float
    loss: float
    tokens: list[ScoredToken] | None = None


class ScoreReport(Answer):
    """loss: over the counted tokens of all items together."""

    object: Literal["list"] = "list"
    model: str
    data: list[Score]
    loss: float
    usage: UsageReport
    adapter: AdapterUsed | None
    x_tessera: Measured
