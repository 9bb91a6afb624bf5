"""Requests and responses of /v1/models, /v1/adapters, /health and /version."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from service.http.schemas.common import Answer, Request


class Model(Answer):
    """The base model, or an adapter, as OpenAI's clients see them."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str = Field(description="The base model.")
    parent: str | None
    adapter_version: int | None = Field(
        description="The active version; None for the base model and for intermediate states."
    )


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
    """The change to an adapter: which version is active, for instance to roll back."""

    active_version: int = Field(ge=1, le=2**31 - 1)


class Health(Answer):
    """Whether the service can answer requests."""

    status: Literal["ok", "unavailable"]
    down: dict[str, str] = Field(
        default_factory=dict, description="The parts that are down, with the reason."
    )


class Version(Answer):
    name: str
    version: str
    base_model: str
