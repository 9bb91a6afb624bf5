"""Requests to /v1/completions and /v1/chat/completions. `schemas/answers.py` has the responses."""

from __future__ import annotations

from collections.abc import Set
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from service.generation.generator import MAX_SEQUENCES
from service.http.schemas import fields
from service.http.schemas.common import ModelRequest, Options, Request, Strict
from tessera.data.messages import TEMPLATE_ROLES
from tessera.errors import InvalidInput

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
    """Tell which of the four forms a prompt has, so that a mistake is reported once and not four times."""
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
#: Only the first wrong item of a long list is reported: a report of 200,000 took 8 s and a gigabyte.
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_SEQUENCES, fail_fast=True), Tag("~texts")]
    | Annotated[TokenIds, Tag("~tokens")]
    | Annotated[
        list[TokenIds], Field(min_length=1, max_length=MAX_SEQUENCES, fail_fast=True), Tag("~token_lists")
    ],
    Discriminator(_kind_of_prompt),
]


class StreamOptions(Request):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="Report the usage so far in every chunk.")

    neutral = fields.STREAM_NEUTRAL


class GenerationFields(ModelRequest):
    """The fields that both endpoints have. Null means the default."""

    ignored = fields.GENERATION_IGNORED
    advice = fields.GENERATION_ADVICE

    n: int | None = Field(1, ge=1, le=MAX_CHOICES, description="Choices per prompt.")
    best_of: int | None = Field(None, ge=1, description="Only the value of `n` is accepted.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | None = Field(
        None, description=f"Up to {MAX_STOP_STRINGS} strings that end the text and are not part of it."
    )
    seed: int | None = Field(None, ge=-_MAX_INT64, le=_MAX_INT64)
    temperature: float | None = Field(1.0, ge=0, le=2, description="0: greedy.")
    top_p: float | None = Field(1.0, gt=0, le=1)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_BIASES, description="Bias by token id."
    )
    top_k: int | None = Field(0, ge=-1, le=_MAX_INT64, description="0 and -1: off.")
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=10)
    min_tokens: int | None = Field(0, ge=0, le=_MAX_INT64)
    ignore_eos: bool | None = False
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_BIASES)
    skip_special_tokens: bool = Field(True, description="false: the text shows them.")
    include_stop_str_in_output: bool = Field(
        False, description="Whether the stop string or stop token that ends the text is a part of it."
    )
    return_token_ids: bool = Field(False, description="Return `token_ids` and `prompt_token_ids`.")
    return_tokens_as_token_ids: bool = Field(
        False, description="Write tokens as `token_id:<id>` in log-probabilities."
    )

    @field_validator("logit_bias")
    @classmethod
    def _check_keys(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        for key in biases or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key):
                raise ValueError("the keys must be token ids, such as 42")
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
                "best_of: only the value of n is supported; raise n and choose among the choices",
                param="best_of",
                code="unsupported_parameter",
            )
        return self

    @property
    def has_logprobs(self) -> bool:
        """Whether the request wants log-probabilities; the two endpoints have different fields for it."""
        raise NotImplementedError


class CompletionRequest(GenerationFields):
    """A prompt to continue: text, token ids, or a list of either."""

    prompt: Prompt = Field(description="Text, token ids, or a list of either.")
    max_tokens: int | None = Field(16, ge=0, le=_MAX_INT64, description="0 is allowed with `echo` only.")
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
    cache_control: Any = Field(None, description=f"ignored: {fields.MESSAGE_IGNORED['cache_control']}")
    annotations: Any = Field(None, description=f"ignored: {fields.MESSAGE_IGNORED['annotations']}")


Content = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("~parts")],
    Discriminator(_kind_of_content),
]


class ChatMessage(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(
        None, max_length=256, description="Name of the speaker, for templates that show it."
    )

    ignored = fields.MESSAGE_IGNORED
    neutral = fields.MESSAGE_NEUTRAL

    def to_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it. "developer" is OpenAI's newer word for "system"."""
        parts = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": TEMPLATE_ROLES.get(self.role, self.role), "content": parts, **named}


class ChatCompletionRequest(GenerationFields):
    """A conversation that the assistant continues."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(
        None, ge=1, le=_MAX_INT64, description="Default: until the context is full."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=_MAX_INT64, description="The newer name of `max_tokens`."
    )
    reasoning_effort: str | None = Field(None, max_length=32, description="For chat templates that read it.")
    chat_template_kwargs: Options | None = Field(None, description="Variables of the chat template.")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    neutral = fields.CHAT_NEUTRAL

    @property
    def has_logprobs(self) -> bool:
        return bool(self.logprobs)

    def template_variables(self, known: Set[str]) -> dict[str, Any]:
        """Return the variables of the chat template. known: the names that it reads.

        Raises `InvalidInput` for any other name, because the answer would not depend on it.
        """
        named = {f"chat_template_kwargs.{n}": (n, v) for n, v in (self.chat_template_kwargs or {}).items()}
        named["reasoning_effort"] = ("reasoning_effort", self.reasoning_effort)
        variables: dict[str, Any] = {}
        for param, (name, value) in named.items():
            if value is None or (name == "add_generation_prompt" and value is True):
                continue
            if name not in known:
                others = f"it reads {', '.join(sorted(known))}" if known else "it reads none that can be set"
                message = f"the base model's chat template has no variable {name!r}; {others}"
                raise InvalidInput(message, param=param, code="unsupported_parameter")
            if variables.setdefault(name, value) != value:
                message = f"{name} is given as {variables[name]!r} and as {value!r}; give it once"
                raise InvalidInput(message, param=param)
        return variables

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidInput("top_logprobs is only for logprobs: true", param="top_logprobs")
        newer, older = self.max_completion_tokens, self.max_tokens
        if newer is not None and older not in (None, newer):
            message = f"max_completion_tokens is {newer} and max_tokens {older}; give one of them"
            raise InvalidInput(message, param="max_completion_tokens")
        return self
