"""Responses of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.http.schemas.common import AdapterUsed, Answer, Measured, UsageReport

#: A list of token ids, which a response has only with `return_token_ids`.
TokenIdList = Annotated[list[int] | None, Field(exclude_if=lambda ids: ids is None)]


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    prompt_token_ids: TokenIdList = None
    token_ids: TokenIdList = None


class Completion(Answer):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageReport
    adapter: AdapterUsed | None
    x_tessera: Measured


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: TokenIdList = None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReport
    prompt_token_ids: TokenIdList = None
    adapter: AdapterUsed | None
    x_tessera: Measured
