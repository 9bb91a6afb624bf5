"""Requests and responses of /v1/bases."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from service.http.schemas.common import Answer, Options, Request
from service.http.schemas.training import JobError, Metadata, ModuleNames


class BasisObject(Answer):
    id: str
    object: Literal["basis"] = "basis"
    base_model_id: str
    method: str
    rank: int
    dtype: str
    num_modules: int
    bytes: int = Field(description="Size of all factors.")
    is_default: bool | None = Field(description="None while the engine is not ready.")
    is_own: bool = Field(description="Whether it is the caller's private basis; all others are shared.")


class ModuleObject(Answer):
    name: str
    d_in: int
    d_out: int


class BasisDetail(BasisObject):
    modules: list[ModuleObject]
    recipe: dict[str, Any]


class BasisJobRequest(Request):
    """A basis to be built and kept. `GET /v1/bases/methods` lists the methods."""

    method: str = Field(
        min_length=1, max_length=64, description="Name of a method, or of a preset for its basis."
    )
    rank: int | None = Field(None, ge=1, le=512)
    target_modules: ModuleNames | None = Field(None, description="Patterns of module names.")
    options: Options = Field(default_factory=dict)
    calibration_file: str | None = Field(None, max_length=128, description="Id of a file of examples.")
    metadata: Metadata | None = None


class BasisJob(Answer):
    """A job that builds a basis."""

    id: str
    object: Literal["basis.job"] = "basis.job"
    created_at: int
    started_at: int | None
    finished_at: int | None
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    basis: str | None = Field(description="The basis' id, once the job has succeeded.")
    method: str
    rank: int
    target_modules: list[str] | None
    options: dict[str, Any]
    calibration_file: str | None
    progress: dict[str, Any] = Field(description="`modules_done` and `modules` of a running job.")
    result: dict[str, Any] | None
    error: JobError | None
    metadata: dict[str, Any]
    attempt: int
    queue_position: int | None = Field(description="Place among the caller's own waiting jobs, from 1.")


class BasisMethods(Answer):
    """All methods, inits (`starts`), presets and LoRA forms by name, each with its options."""

    object: Literal["basis.methods"] = "basis.methods"
    methods: dict[str, dict[str, Any]]
    starts: dict[str, dict[str, Any]]
    presets: dict[str, dict[str, Any]]
    lora_forms: dict[str, dict[str, Any]]
