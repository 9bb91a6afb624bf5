"""Settings of the trainer worker: TESSERA_WORKER_*, read from the environment once, frozen."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from tessera.settings import CommonSettings, refuse_unknown_variables

PREFIX = "TESSERA_WORKER_"
DEFAULT_METRICS_PORT = 9100


class WorkerSettings(BaseSettings):
    """The settings of one worker."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    max_resident_jobs: int = Field(
        default=8, ge=1, le=1024, description="maximum number of jobs that are trained together"
    )
    token_budget: int = Field(
        default=8192,
        ge=1,
        description="tokens with padding in one pass; another job is claimed while the jobs have fewer",
    )
    learning_rate_search: bool = Field(
        default=True, description="jobs without a learning rate try several at once"
    )
    max_tokens: int = Field(
        default=1024, ge=8, description="longer examples are truncated, with a warning in the job"
    )
    lease_s: float = Field(
        default=60.0, ge=1, description="a worker that is silent for longer loses its jobs"
    )
    checkpoint_every_s: float = Field(
        default=10.0, gt=0, description="work that a killed worker may lose of each job"
    )
    report_every_s: float = Field(
        default=1.0, ge=0, description="minimum time between two metrics events of a job"
    )
    log_every_s: float = Field(
        default=10.0, ge=0, description="minimum time between two lines of the log about a job's training"
    )
    keep_checkpoints: int = Field(
        default=3, ge=0, le=20, description="latest evaluated states of a job that can be asked as models"
    )
    report_samples: int = Field(
        default=3, ge=0, le=20, description="held-out prompts that a job's report answers; 0: none"
    )
    reap_every_s: float = Field(
        default=5.0, gt=0, description="time between two searches for jobs of lost workers"
    )
    stop_timeout_s: float = Field(
        default=15.0, gt=0, description="time to checkpoint and give back all jobs at a stop"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of /metrics and /health")
    metrics_port: int = Field(
        default=DEFAULT_METRICS_PORT, ge=0, le=65535, description="port of /metrics and /health; 0: none"
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads for training; unset: torch's default"
    )
    load_at_start: bool = Field(
        default=False, description="load the base model at start instead of for the first job"
    )
    worker_id: str | None = Field(
        default=None, max_length=128, description="unset: made of host, process id and a random part"
    )


def read_settings() -> tuple[CommonSettings, WorkerSettings]:
    """Read the common and the worker's settings from the environment.

    Raises `InvalidInput` for a variable that neither of them has.
    """
    refuse_unknown_variables(CommonSettings, WorkerSettings, sections=(PREFIX,))
    return CommonSettings(), WorkerSettings()
