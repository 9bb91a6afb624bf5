"""A training job: its specification, its state, its events, and how they are read from Redis.

A record is a hash of strings; its structured fields are JSON. Readers ignore fields that they do not know,
and fill in missing ones, so that an old and a new release can share one queue. Times are Unix seconds by the
clock of the Redis server. This module knows no Redis commands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from tessera.errors import CorruptRecord
from tessera.methods.scaling import Scaling

#: Value of `JobSpec.calibration`: the calibration data are the examples that the job trains on.
OWN_DATA = "own"

#: Fields of a JobSpec that its stored JSON calls by another name.
_STORED_NAMES = {"deletion_count": "generation"}

#: The server's reply for one job: its id, its hash as name, value, name, value …, and its place in the
#: backlog.
JobReply = tuple[bytes, list[bytes], int]


class JobStatus(StrEnum):
    """The state of a job. The last three are final."""

    QUEUED = "queued"  # waits for a worker, or for `not_before`
    RUNNING = "running"  # leased to a worker, even if a cancellation or a pause was requested
    PAUSED = "paused"  # waits for its owner
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """The specification of what to train or to build. It is written once at submission and never changes."""

    #: "adapter" trains an adapter; "basis" builds a basis, with empty adapter_id and training_file.
    kind: str = "adapter"
    #: "core" trains R in a frozen basis. "lora" trains A and B in the LoRA form that `method` names
    #: (`tessera/methods/forms.py`), and publishes them as a private basis.
    form: str = "core"
    adapter_id: str = ""
    training_file: str = ""
    base_model: str
    #: How the basis is found or built, unless basis_id names a stored one.
    method: str = "lora_xs"
    rank: int = 16
    #: Options of the method; for form "lora", of what A and B start from.
    basis_options: dict[str, Any] = field(default_factory=dict)
    #: Name patterns; None: those of the worker's settings.
    target_modules: list[str] | None = None
    #: The ranks of modules that have another (`tessera/model/rank_pattern.py`); None: none has.
    rank_pattern: dict[str, int] | None = None
    #: What the job says about its scale (`Scaling`).
    scale: float | None = None
    alpha: float | None = None
    use_rslora: bool = False
    #: Data that the basis is built from: None, OWN_DATA or the id of a file.
    calibration: str | None = None
    #: How R is initialized: {"method", "options"}. None: zero, or the adapter `warm_start_from`.
    start: dict[str, Any] | None = None
    #: `AdapterStore.deletion_count` of the adapter's name when the job was created.
    deletion_count: int = 0
    validation_file: str | None = None
    basis_id: str | None = None
    #: Keys are those of `hyperparameters.HYPERPARAMETERS`. The value "auto" means the same as a missing key.
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    suffix: str | None = None
    early_stopping: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    #: An adapter, with an optional version, to continue from.
    warm_start_from: str | None = None
    #: {"problem_type", "head_learning_rate", "head_only"} of a job that trains a classifier; None: the job
    #: trains a model that generates.
    classification: dict[str, Any] | None = None
    #: What training minimises: "supervised", or "dpo" on pairs of answers (`preference.py`).
    objective: str = "supervised"
    #: Of "dpo": the options that are not "auto".
    objective_options: dict[str, Any] = field(default_factory=dict)

    @property
    def largest_rank(self) -> int:
        """The rank of the basis, at most: a module may be left out by `target_modules`."""
        return max(self.rank, *(self.rank_pattern or {}).values()) if self.rank_pattern else self.rank

    @property
    def scaling(self) -> Scaling:
        return Scaling(self.scale, self.alpha, self.use_rslora)

    def to_json(self) -> str:
        return to_json({_STORED_NAMES.get(name, name): value for name, value in asdict(self).items()})

    @classmethod
    def from_json(cls, text: str | bytes) -> JobSpec:
        values = json.loads(text)
        stored_names = {known.name: _STORED_NAMES.get(known.name, known.name) for known in fields(cls)}
        return cls(**{name: values[stored] for name, stored in stored_names.items() if stored in values})


@dataclass(frozen=True)
class Job:
    """A job as it was when it was read."""

    job_id: str
    tenant: str
    spec: JobSpec
    status: JobStatus
    created_at: float
    started_at: float | None
    finished_at: float | None
    #: Attempts that count, including the running one; 0 before the first.
    attempt: int
    #: Fencing number of the last claim.
    epoch: int
    #: Estimated tokens.
    cost: int
    progress: dict[str, Any]
    result: dict[str, Any] | None
    #: {code, message, param} of a failed job.
    error: dict[str, Any] | None
    #: Place among the tenant's claimable jobs, counted from 1; None if the job is not claimable.
    queue_position: int | None
    not_before: float | None = None
    cancel_requested: bool = False
    pause_requested: bool = False
    #: The worker shall publish the best state so far and end the job as succeeded.
    stop_requested: bool = False
    #: When `progress` was reported; None before, or if an earlier release reported it.
    progress_at: float | None = None
    #: Attempts that ended with the death of their worker.
    num_lost_workers: int = 0


@dataclass(frozen=True)
class JobEvent:
    """One entry in the history of a job."""

    event_id: str  # strictly rising within a job; serves as a cursor
    created_at: float
    level: str  # info, warn or error
    type: str  # message or metrics
    message: str
    data: dict[str, Any]


def parse_job(reply: JobReply) -> Job:
    """Parse the server's reply for one job. Raises `CorruptRecord`."""
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
            stop_requested="stop_requested" in record,
            progress_at=_seconds(record.get("progress_ms")),
            num_lost_workers=int(record.get("lost_workers", 0)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptRecord(f"job {job_id!r} cannot be read: {type(error).__name__}: {error}") from error


def parse_event(event_id: bytes, flat: list[bytes]) -> JobEvent:
    """Parse a stream entry. Raises `CorruptRecord`."""
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
    """Write compact JSON. NaN and infinities become null, so that a diverged loss does not break readers."""
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
