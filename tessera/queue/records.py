"""What a training job is: its specification, its state, its events, and how they are read back from Redis.

Knows no Redis commands. A record is a hash of strings, its structured fields JSON. Readers pass over fields
that they do not know and fill in those that are missing, so an old and a new release can share one queue.
Times are Unix seconds of the Redis server's clock.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from tessera.errors import CorruptRecord

#: Of a job's basis: its calibration data are the examples that it trains on.
OWN_DATA = "own"

#: The names in `JobSpec.hyperparameters`.
HYPERPARAMETERS = (
    "n_epochs", "batch_size", "learning_rate_multiplier", "learning_rate", "lr_scheduler_type",
    "warmup_ratio", "weight_decay", "max_length",
)  # fmt: skip

#: Fields of a JobSpec that its stored JSON calls by another name.
_STORED_NAMES = {"deletion_count": "generation"}

#: The server's reply for one job: its id, its hash as name, value, name, value …, its place in the backlog.
JobReply = tuple[bytes, list[bytes], int]


class JobStatus(StrEnum):
    """Where a job is. The last three are final."""

    QUEUED = "queued"  # waits for a worker, or for its time
    RUNNING = "running"  # leased to a worker, also while a cancellation or a pause is asked of it
    PAUSED = "paused"  # waits for its owner
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What to train or to build: written once at submission, never changed.

    kind: "adapter" trains one; "basis" builds a basis and leaves adapter_id and training_file empty.

    form: "core" trains R in a frozen basis; "lora" trains A and B as the LoRA form `method` says
    (`forms.py`), with basis_options for what it starts from, and publishes a basis of its own.

    The basis: basis_id, if it is stored already; else method, rank and basis_options say how it is found or
    built (target_modules None: those of the worker's settings), from calibration: None, "own" (the examples
    that the job trains on) or the id of a file. start: {"method", "options"} of `START_METHODS`, None: zero,
    or the adapter `warm_start_from`.

    deletion_count: of the adapter's name when the job was created (`AdapterStore.deletion_count`).
    hyperparameters: by the names in `HYPERPARAMETERS`; "auto" is the same as none.
    """

    kind: str = "adapter"
    form: str = "core"
    adapter_id: str = ""
    training_file: str = ""
    base_model: str
    method: str = "lora_xs"
    rank: int = 16
    basis_options: dict[str, Any] = field(default_factory=dict)
    target_modules: list[str] | None = None
    calibration: str | None = None
    start: dict[str, Any] | None = None
    deletion_count: int = 0
    validation_file: str | None = None
    basis_id: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    suffix: str | None = None
    early_stopping: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    warm_start_from: str | None = None

    def to_json(self) -> str:
        return to_json({_STORED_NAMES.get(name, name): value for name, value in asdict(self).items()})

    @classmethod
    def from_json(cls, text: str | bytes) -> JobSpec:
        values = json.loads(text)
        stored_names = {known.name: _STORED_NAMES.get(known.name, known.name) for known in fields(cls)}
        return cls(**{name: values[stored] for name, stored in stored_names.items() if stored in values})


@dataclass(frozen=True)
class Job:
    """One request to train or to build, as it was when it was read.

    attempt: tries that count, the running one included; 0 before the first. epoch: the fencing number of the
    last claim. cost: estimated tokens. error: {code, message, param} of a failed job. queue_position: 1-based
    place among its tenant's claimable jobs, None if it is not one of them. num_lost_workers: attempts that
    ended with their worker.
    """

    job_id: str
    tenant: str
    spec: JobSpec
    status: JobStatus
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempt: int
    epoch: int
    cost: int
    progress: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    queue_position: int | None
    not_before: float | None = None
    cancel_requested: bool = False
    pause_requested: bool = False
    num_lost_workers: int = 0


@dataclass(frozen=True)
class JobEvent:
    """One line of a job's history. event_id rises strictly within a job and serves as a cursor."""

    event_id: str
    created_at: float
    level: str  # info, warn or error
    type: str  # message or metrics
    message: str
    data: dict[str, Any]


def parse_job(reply: JobReply) -> Job:
    """The job in a reply of the server. Raises `CorruptRecord` if it cannot be read."""
    job_id, flat, position = reply
    record = {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
    try:
        return Job(
            job_id=job_id.decode(),
            tenant=record["tenant"].decode(),
            spec=JobSpec.from_json(record["spec"]),
            status=JobStatus(record["status"].decode()),
            created_at=int(record["created_ms"]) / 1000,
            started_at=_seconds(record.get("started_ms")),
            finished_at=_seconds(record.get("finished_ms")),
            attempt=int(record["attempt"]),
            epoch=int(record["epoch"]),
            cost=int(record["cost"]),
            progress=json.loads(record.get("progress", b"{}")),
            result=_optional_json(record.get("result")),
            error=_optional_json(record.get("error")),
            queue_position=position or None,
            not_before=_seconds(record.get("due_ms")),
            cancel_requested="cancel_requested" in record,
            pause_requested="pause_requested" in record,
            num_lost_workers=int(record.get("lost_workers", 0)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptRecord(f"job {job_id!r} cannot be read: {type(error).__name__}: {error}") from error


def parse_event(event_id: bytes, flat: list[bytes]) -> JobEvent:
    """The event in a stream entry. Raises `CorruptRecord` if it cannot be read."""
    entry = {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}
    try:
        return JobEvent(
            event_id=event_id.decode(),
            created_at=int(event_id.split(b"-")[0]) / 1000,
            level=entry["level"],
            type=entry["type"],
            message=entry["message"],
            data=json.loads(entry["data"]),
        )
    except (KeyError, ValueError) as error:
        raise CorruptRecord(f"event {event_id!r} cannot be read: {error}") from error


def to_json(value: Mapping[str, Any]) -> str:
    """Compact JSON. NaN and infinities become null: a diverged loss must not break those who read it."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _seconds(milliseconds: bytes | None) -> float | None:
    return None if milliseconds is None else int(milliseconds) / 1000


def _optional_json(text: bytes | None) -> dict[str, Any] | None:
    return None if text is None else json.loads(text)
