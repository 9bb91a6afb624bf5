"""Uploaded files in Redis: a record, the content as one string, an index per tenant by time of upload.

Contents of tens of MB travel in pieces, so that neither the server nor a time-out notices the size. A file is
visible only when all of it is there: an upload that breaks off leaves a content that expires, and no record.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adapter_core import keys
from adapter_core.errors import CorruptRecord, NotFound, StoreUnavailable
from adapter_core.redis_client import Argument, Client, Script, translate_errors

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
#: Of content, per command: a reply of this size holds up the other clients for 2 to 7 ms.
CHUNK_BYTES = keys.MAX_MGET_BYTES
#: An upload that takes longer than this between two pieces is gone.
UPLOAD_TTL_S = 600

# KEYS: content. ARGV: offset, piece, lifetime in s. Reply: 1, or 0 if what comes before the offset expired
# (SETRANGE alone would put zeros there).
_WRITE_PIECE = Script("""
if redis.call('STRLEN', KEYS[1]) < tonumber(ARGV[1]) then
  return 0
end
redis.call('SETRANGE', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
""")

# KEYS: record, content, index. ARGV: file id, created_at, bytes, then the fields of the record.
# Reply: 1, or 0 if the content has expired.
_FINISH = Script("""
local record, content, index = KEYS[1], KEYS[2], KEYS[3]
if redis.call('STRLEN', content) ~= tonumber(ARGV[3]) then
  return 0
end
redis.call('PERSIST', content)
redis.call('HSET', record, unpack(ARGV, 4))
redis.call('ZADD', index, ARGV[2], ARGV[1])
return 1
""")

# KEYS: record, content, index. ARGV: file id. Reply: how many records there were.
_DELETE = Script("""
redis.call('UNLINK', KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
return redis.call('DEL', KEYS[1])
""")

# KEYS: index. ARGV: the file id to go on after or "", how many. Reply: ids, newest first.
_PAGE = Script("""
local first = 0
if ARGV[1] ~= '' then
  local rank = redis.call('ZREVRANK', KEYS[1], ARGV[1])
  if not rank then
    return false
  end
  first = rank + 1
end
return redis.call('ZREVRANGE', KEYS[1], first, first + ARGV[2] - 1)
""")


@dataclass(frozen=True)
class FileRecord:
    """An uploaded file without its content. created_at: Unix time; num_examples: None if nobody counted."""

    file_id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: float
    num_examples: int | None
    sha256: str


class FileStore:
    """The files of all tenants. Every method raises `StoreUnavailable`, `put` also `StoreFull`."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis

    async def put(
        self, tenant: str, *, filename: str, purpose: str, content: bytes, num_examples: int | None = None
    ) -> FileRecord:
        """Store a file under a new id."""
        record = FileRecord(
            file_id=f"file-{secrets.token_hex(12)}",
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            bytes=len(content),
            created_at=time.time(),
            num_examples=num_examples,
            sha256=await asyncio.to_thread(_sha256, content),
        )
        with translate_errors():
            await self._redis.sadd(keys.tenants(), tenant)
        if not await self._upload(record, content):
            raise StoreUnavailable(f"the upload of {filename!r} was interrupted for over {UPLOAD_TTL_S} s")
        return record

    async def _upload(self, record: FileRecord, content: bytes) -> bool:
        names = _names(record.tenant, record.file_id)
        for start in range(0, len(content), CHUNK_BYTES):
            piece: list[Argument] = [start, content[start : start + CHUNK_BYTES], UPLOAD_TTL_S]
            if not await _WRITE_PIECE(self._redis, keys=names[1:2], args=piece):
                return False
        args = [record.file_id, record.created_at, record.bytes, *_to_fields(record)]
        return bool(await _FINISH(self._redis, keys=names, args=args))

    async def get(self, tenant: str, file_id: str) -> FileRecord:
        """Raises `NotFound`, `CorruptRecord`."""
        if not FILE_ID.fullmatch(file_id):
            raise _not_found(file_id)
        with translate_errors():
            fields: Any = await self._redis.hgetall(keys.file_record(tenant, file_id))
        if not fields:
            raise _not_found(file_id)
        return _from_fields(tenant, file_id, fields)

    async def content(self, tenant: str, file_id: str) -> bytes:
        """All bytes, verified. Raises `NotFound`, `CorruptRecord`."""
        record = await self.get(tenant, file_id)
        key = keys.file_content(tenant, file_id)
        pieces: list[Any] = []
        with translate_errors():
            for start in range(0, record.bytes, CHUNK_BYTES):
                pieces.append(await self._redis.getrange(key, start, start + CHUNK_BYTES - 1))
        content = b"".join(pieces)
        if await asyncio.to_thread(_sha256, content) != record.sha256:
            await self.get(tenant, file_id)  # it was deleted while it was read
            raise CorruptRecord(f"the content of {file_id} fails its checksum")
        return content

    async def delete(self, tenant: str, file_id: str) -> bool:
        """False: there is no such file."""
        if not FILE_ID.fullmatch(file_id):
            return False
        return bool(await _DELETE(self._redis, keys=_names(tenant, file_id), args=[file_id]))

    async def list(
        self, tenant: str, *, after: str | None = None, limit: int = 20
    ) -> tuple[list[FileRecord], bool]:
        """A page of files, newest first, and whether more follow. Raises `NotFound` if `after` is gone."""
        if after is not None and not FILE_ID.fullmatch(after):
            raise _not_found(after, param="after")
        ids = await _PAGE(self._redis, keys=[keys.file_index(tenant)], args=[after or "", limit + 1])
        if ids is None:
            raise _not_found(after or "", param="after")
        names = [file_id.decode() for file_id in ids[:limit]]
        with translate_errors():
            pipeline = self._redis.pipeline(transaction=False)
            for name in names:
                pipeline.hgetall(keys.file_record(tenant, name))
            hashes = await pipeline.execute() if names else []
        records = [_from_fields(tenant, name, f) for name, f in zip(names, hashes, strict=True) if f]
        return records, len(ids) > limit


def _names(tenant: str, file_id: str) -> list[str]:
    return [keys.file_record(tenant, file_id), keys.file_content(tenant, file_id), keys.file_index(tenant)]


def _to_fields(record: FileRecord) -> list[str | int | float]:
    """Field, value, field, value … of the record's hash; what is None is left out."""
    values = {name: value for name, value in asdict(record).items() if name not in ("file_id", "tenant")}
    return [part for pair in values.items() if pair[1] is not None for part in pair]


def _from_fields(tenant: str, file_id: str, fields: Mapping[bytes, bytes]) -> FileRecord:
    try:
        num_examples = fields.get(b"num_examples")
        return FileRecord(
            file_id=file_id,
            tenant=tenant,
            filename=fields[b"filename"].decode(),
            purpose=fields[b"purpose"].decode(),
            bytes=int(fields[b"bytes"]),
            created_at=float(fields[b"created_at"]),
            num_examples=None if num_examples is None else int(num_examples),
            sha256=fields[b"sha256"].decode(),
        )
    except (ValueError, KeyError) as error:
        raise CorruptRecord(f"unreadable record of {file_id}: {error!r}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _not_found(file_id: str, *, param: str = "file_id") -> NotFound:
    return NotFound(f"there is no file {file_id!r}", param=param, code="file_not_found")
