"""Requests and answers of /v1/models, /v1/adapters and the health pages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from service.http.schemas.common import Answer, Request


class Model(Answer):
    """The base model, or an adapter as OpenAI's clients see it. root: the base model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None
    adapter_version: int | None = Field(description="the active version; None for the base model")


class AdapterVersionObject(Answer):
    version: int
    created_at: int
    bytes: int
    basis: str
    rank: int
    dtype: str
    job: str | None
    metadata: dict[str, Any]


class AdapterObject(Answer):
    id: str
    object: Literal["adapter"] = "adapter"
    created_at: int
    updated_at: int
    base_model_id: str
    active_version: int
    latest_version: int
    versions: list[AdapterVersionObject]


class AdapterPatchRequest(Request):
    """What can be changed: which version is active (rollback)."""

    active_version: int = Field(ge=1, le=2**31 - 1)


class Health(Answer):
    """down: the parts that do not answer, with the reason."""

    status: Literal["ok", "unavailable"]
    down: dict[str, str] = Field(default_factory=dict)


class Version(Answer):
    name: str
    version: str
    base_model: str
