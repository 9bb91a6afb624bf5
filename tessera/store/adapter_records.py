"""What the store says about an adapter and its versions, and how that is written. Knows no Redis."""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tessera.errors import CorruptRecord

_VERSION_FIELD = b"v:"


@dataclass(frozen=True)
class AdapterVersion:
    """One immutable version. bytes: of its packed form; created_at: Unix time; metadata: the adapter's."""

    version: int
    created_at: float
    bytes: int
    basis_id: str
    rank: int
    dtype: str
    job_id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | builtins.bytes) -> AdapterVersion:
        """Raises `CorruptRecord`."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise CorruptRecord(f"unreadable description of an adapter version: {error}") from error


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter with all its versions, oldest first. created_at, updated_at: Unix times."""

    tenant: str
    adapter_id: str
    active_version: int
    latest_version: int
    created_at: float
    updated_at: float
    base_model_id: str
    versions: tuple[AdapterVersion, ...]

    @classmethod
    def from_hash(cls, tenant: str, adapter_id: str, fields: Mapping[bytes, bytes]) -> AdapterRecord:
        """From the record's hash in Redis. Raises `CorruptRecord`."""
        versions = [
            AdapterVersion.from_json(fields[name]) for name in fields if name.startswith(_VERSION_FIELD)
        ]
        try:
            return cls(
                tenant=tenant,
                adapter_id=adapter_id,
                active_version=int(fields[b"active"]),
                latest_version=int(fields[b"latest"]),
                created_at=float(fields[b"created_at"]),
                updated_at=float(fields[b"updated_at"]),
                base_model_id=fields[b"base_model_id"].decode(),
                versions=tuple(sorted(versions, key=lambda version: version.version)),
            )
        except (ValueError, KeyError) as error:
            raise CorruptRecord(f"unreadable record of adapter {adapter_id!r}: {error!r}") from error
