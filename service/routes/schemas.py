"""What all requests and answers have in common: strictness, the error body, lists.

Types are strict: "7" and true are no integers, NaN is no number. OpenAI's endpoints pass over fields that
they do not know, as OpenAI's clients expect, but refuse the known ones that would change the answer and that
Tessera does not implement; our own endpoints refuse whatever they do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapter_core.errors import InvalidInput

Item = TypeVar("Item")
IsHarmless = Callable[[Any, Mapping[str, Any]], bool]

#: What the tags of unions begin with: they turn up in the path of an error, but are no part of a name.
UNION_TAG = "~"

MAX_MODEL_NAME = 256
MODEL_FIELD = Field(
    max_length=MAX_MODEL_NAME, description="the base model, `<adapter>` or `<adapter>@<version>`"
)


def absent(value: Any, body: Mapping[str, Any]) -> bool:
    """For a parameter that must not be used: null and empty are the same as leaving it out."""
    return value is None or value == [] or value == {} or value == "" or value is False


def one_of(*values: Any) -> IsHarmless:
    """For a parameter of which only these values (and null) are implemented."""
    return lambda value, body: value is None or value in values


class Strict(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class OpenAIRequest(BaseModel):
    """A request to one of OpenAI's endpoints."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    #: Parameters of OpenAI (and vLLM) that change the answer, and when they may be sent all the same.
    unsupported: ClassVar[dict[str, IsHarmless]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name, is_harmless in cls.unsupported.items():
                if name in body and not is_harmless(body[name], body):
                    raise InvalidInput(
                        f"{name} is not supported with this value", param=name, code="unsupported_parameter"
                    )
        return body


class Answer(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(protected_namespaces=())


class LineProblem(Answer):
    line: int
    code: str
    message: str


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None
    errors: list[LineProblem] | None = Field(None, description="problems of a training file, by line")


class ErrorBody(Answer):
    """What every error looks like."""

    error: ErrorDetail


class Deleted(Answer):
    id: str
    object: str
    deleted: bool = True


class Page(Answer, Generic[Item]):
    """One page of a list; the next one starts `after` the last id."""

    object: str = "list"
    data: list[Item]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class AdapterUsed(Answer):
    """Which adapter answered."""

    id: str
    version: int


class Measured(Answer):
    """Time to the first token, and the most distinct models that shared a step with the request."""

    ttft_ms: float | None
    max_distinct_in_batch: int


class PromptTokens(Answer):
    cached_tokens: int


class UsageReport(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


def page_of(items: list[Item], has_more: bool) -> Page[Item]:
    """A page of items that have an `id`."""
    ids = [getattr(item, "id", None) for item in items]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return Page(data=items, has_more=has_more, first_id=first, last_id=last)
