"""Requests and answers of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from adapter_core.errors import InvalidInput
from service.generation import MAX_SEQUENCES
from service.routes import fields
from service.routes.schemas import (
    AdapterUsed,
    Answer,
    Measured,
    ModelRequest,
    Request,
    Strict,
    UsageReport,
)

MAX_CHOICES = 16
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_MESSAGES = 2048
_MAX_INT64 = 2**63 - 1

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


def _kind_of(value: Any) -> str:
    return "~string" if isinstance(value, str) else "~list"


def _kind_of_prompt(value: Any) -> str:
    """Which of the four forms is meant, so that a mistake is reported once and not four times."""
    if not isinstance(value, list):
        return "~text"
    first = value[0] if value else None
    return "~texts" if isinstance(first, str) else "~token_lists" if isinstance(first, list) else "~tokens"


def _kind_of_content(value: Any) -> str:
    return "~parts" if isinstance(value, list) else "~text"


Stop = Annotated[
    Annotated[StopString, Tag("~string")]
    | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), Tag("~list")],
    Discriminator(_kind_of),
]
#: The first wrong item of a long list is named, not every one: a body has room for a million.
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_SEQUENCES), Tag("~texts")]
    | Annotated[TokenIds, Tag("~tokens")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_SEQUENCES), Tag("~token_lists")],
    Discriminator(_kind_of_prompt),
]


class StreamOptions(Request):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="usage so far in every chunk")

    neutral = fields.STREAM_NEUTRAL


class GenerationFields(ModelRequest):
    """What both endpoints have. Null means the default."""

    ignored = fields.GENERATION_IGNORED
    advice = fields.GENERATION_ADVICE

    n: int | None = Field(1, ge=1, le=MAX_CHOICES, description="choices per prompt")
    best_of: int | None = Field(None, ge=1, description="only what `n` is")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | None = Field(None, description=f"up to {MAX_STOP_STRINGS} strings; not part of the text")
    seed: int | None = Field(None, ge=-_MAX_INT64, le=_MAX_INT64)
    temperature: float | None = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_p: float | None = Field(1.0, gt=0, le=1)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_BIASES, description="by token id"
    )
    top_k: int | None = Field(0, ge=-1, le=_MAX_INT64, description="0 and -1: off")
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=10)
    min_tokens: int | None = Field(0, ge=0, le=_MAX_INT64)
    ignore_eos: bool | None = False
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_BIASES)
    skip_special_tokens: bool = Field(True, description="false: they are shown in the text")
    include_stop_str_in_output: bool = Field(False, description="what ends the text is a part of it")
    return_token_ids: bool = Field(False, description="`token_ids` and `prompt_token_ids` in the answer")
    return_tokens_as_token_ids: bool = Field(
        False, description="log-probabilities call tokens `token_id:<id>`"
    )

    @field_validator("logit_bias")
    @classmethod
    def _check_keys(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        for key in biases or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError("the keys must be token ids")
        return biases

    @model_validator(mode="after")
    def _check_combinations(self) -> GenerationFields:
        options = self.stream_options or StreamOptions()
        if not self.stream and options != StreamOptions():
            raise InvalidInput("stream_options is only for stream: true", param="stream_options")
        if options.continuous_usage_stats and not options.include_usage:
            param = "stream_options.continuous_usage_stats"
            raise InvalidInput("continuous_usage_stats is only for include_usage: true", param=param)
        if self.return_tokens_as_token_ids and not self.has_logprobs:
            message = "return_tokens_as_token_ids is only for an answer with logprobs"
            raise InvalidInput(message, param="return_tokens_as_token_ids")
        if self.best_of not in (None, self.n or 1):
            raise InvalidInput(
                "best_of: only the value of n is supported; ask for more choices and choose among them",
                param="best_of",
                code="unsupported_parameter",
            )
        return self

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities are asked for; the two endpoints say it differently."""
        raise NotImplementedError

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def has_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionRequest(GenerationFields):
    """A prompt to continue: text, token ids, or a list of either."""

    prompt: Prompt = Field(description="text, token ids, or a list of either")
    max_tokens: int | None = Field(16, ge=0, le=_MAX_INT64, description="0 only with echo")
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    neutral = fields.COMPLETION_NEUTRAL

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidInput("max_tokens 0 is only for echo: true", param="max_tokens")
        return self

    @property
    def has_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def texts(self) -> list[str] | None:
        """The prompts, if they are text."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return self.prompt if isinstance(self.prompt[0], str) else None  # type: ignore[return-value]

    @property
    def token_lists(self) -> list[list[int]]:
        """The prompts, if they are token ids."""
        return self.prompt if isinstance(self.prompt[0], list) else [self.prompt]  # type: ignore[return-value,list-item]


class TextPart(Strict):
    type: Literal["text"]
    text: str
    cache_control: Any = Field(None, description="ignored: the prefix cache finds equal prefixes by itself")


Content = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("~parts")],
    Discriminator(_kind_of_content),
]


class ChatMessage(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, max_length=256, description="of the speaker, for templates that show it")

    ignored = fields.MESSAGE_IGNORED
    neutral = fields.MESSAGE_NEUTRAL

    def to_template(self) -> dict[str, Any]:
        """As chat templates want it; "developer" is OpenAI's newer word for "system"."""
        parts = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": parts, **named}


class ChatCompletionRequest(GenerationFields):
    """A conversation that the assistant is to continue."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, le=_MAX_INT64, description="unset: as far as the context goes")
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_INT64, description="the newer name")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    neutral = fields.CHAT_NEUTRAL

    @property
    def has_logprobs(self) -> bool:
        return bool(self.logprobs)

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidInput("top_logprobs is only for logprobs: true", param="top_logprobs")
        newer, older = self.max_completion_tokens, self.max_tokens
        if newer is not None and older not in (None, newer):
            message = f"max_completion_tokens is {newer} and max_tokens {older}; give one of them"
            raise InvalidInput(message, param="max_completion_tokens")
        return self


#: Of `return_token_ids`: in an answer only if it was asked for.
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
