"""Settings of the trainer worker: TESSERA_WORKER_*, read from the environment once, frozen."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from tessera.settings import CommonSettings, refuse_unknown_variables

PREFIX = "TESSERA_WORKER_"
DEFAULT_METRICS_PORT = 9100


class WorkerSettings(BaseSettings):
    """How many jobs are trained together, and how often they are reported and stored."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    max_resident_jobs: int = Field(default=8, ge=1, le=1024, description="jobs trained together, at most")
    token_budget: int = Field(
        default=8192,
        ge=1,
        description="tokens with padding of one pass; a further job is claimed while below it",
    )
    max_tokens: int = Field(
        default=1024, ge=8, description="longer examples are truncated, and their job says so"
    )
    lease_s: float = Field(default=60.0, ge=1, description="a worker silent for longer has lost its jobs")
    checkpoint_every_s: float = Field(
        default=10.0, gt=0, description="what a killed worker may lose of each job"
    )
    report_every_s: float = Field(
        default=1.0, ge=0, description="least time between two metrics events of a job"
    )
    reap_every_s: float = Field(
        default=5.0, gt=0, description="how often jobs of lost workers are looked for"
    )
    stop_timeout_s: float = Field(
        default=15.0, gt=0, description="jobs are checkpointed and handed back within this"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of /metrics and /health")
    metrics_port: int = Field(
        default=DEFAULT_METRICS_PORT, ge=0, le=65535, description="port of /metrics and /health; 0: none"
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of training; unset: torch's choice"
    )
    load_at_start: bool = Field(
        default=False, description="load the base model at start; unset: when the first job waits"
    )
    worker_id: str | None = Field(
        default=None, max_length=128, description="unset: host, process and a random part"
    )


def read_settings() -> tuple[CommonSettings, WorkerSettings]:
    """Both from the environment. Raises `InvalidInput` for a variable that neither knows."""
    refuse_unknown_variables(CommonSettings, WorkerSettings, sections=(PREFIX,))
    return CommonSettings(), WorkerSettings()
