"""Uploaded files in Redis: a record, the content as one string, and an index per tenant by time of upload.

Contents of tens of MB travel in pieces, so that they neither block the server nor run into a time-out. A file
becomes visible only when it is complete: an interrupted upload leaves content that expires, and no record.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Literal, TypeAlias

from tessera.errors import CorruptRecord, NotFound, StoreUnavailable
from tessera.redis import keys
from tessera.redis.client import Argument, Client, translate_errors
from tessera.store import file_scripts

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
#: Purpose of the files that a training job has made. Users upload files of other purposes.
RESULTS = "fine-tune-results"
#: Bytes of content per command. During an upload of 32 MB the longest command blocks other clients for 3 ms.
#: With pieces of 4 MB it blocks them for 25 ms, and the whole upload takes the store twice as long.
CHUNK_BYTES = 256 * 1024
#: An upload expires if it pauses for longer than this between two pieces.
UPLOAD_TTL_S = 600
#: File ids read at a time while a page of files is filled.
_PAGE_SIZE = 100


@dataclass(frozen=True)
class FileRecord:
    """An uploaded file without its content."""

    file_id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: float  # Unix time
    num_examples: int | None  # None if they were not counted
    sha256: str
    expires_at: int | None = None  # Unix time; None: never
    #: What the lines are: "examples", "pairs" or "labelled"; None for a file that an earlier release stored.
    content_kind: str | None = None


_Records: TypeAlias = list[FileRecord]


class FileStore:
    """The files of all tenants. Every method raises `StoreUnavailable`, `put` also `StoreFull`."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis

    async def put(
        self,
        tenant: str,
        *,
        filename: str,
        purpose: str,
        content: bytes | BinaryIO,
        num_examples: int | None = None,
        content_kind: str | None = None,
        lifetime_s: int | None = None,
        file_id: str | None = None,
    ) -> FileRecord:
        """Store a file under a new id. lifetime_s: seconds until it expires; None: never.

        file_id: replaces the file that has this id.
        """
        now = time.time()
        source = io.BytesIO(content) if isinstance(content, bytes) else content
        if file_id is not None:
            await self.delete(tenant, file_id)
        record = FileRecord(
            file_id=file_id or f"file-{secrets.token_hex(12)}",
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            bytes=source.seek(0, io.SEEK_END),
            created_at=now,
            num_examples=num_examples,
            sha256=await asyncio.to_thread(_sha256_of, source),
            expires_at=None if lifetime_s is None else int(now) + lifetime_s,
            content_kind=content_kind,
        )
        with translate_errors():
            await self._redis.sadd(keys.tenants(), tenant)
        if not await self._upload(record, source):
            raise StoreUnavailable(
                f"the upload of {filename!r} paused for over {UPLOAD_TTL_S} s; upload it again"
            )
        return record

    async def _upload(self, record: FileRecord, source: BinaryIO) -> bool:
        names = _names(record.tenant, record.file_id)
        source.seek(0)
        for start in range(0, record.bytes, CHUNK_BYTES):
            piece: list[Argument] = [start, source.read(CHUNK_BYTES), UPLOAD_TTL_S]
            if not await file_scripts.WRITE_PIECE(self._redis, keys=names[1:2], args=piece):
                return False
        expires_at = "" if record.expires_at is None else record.expires_at
        args = [record.file_id, record.created_at, record.bytes, expires_at, *_to_fields(record)]
        return bool(await file_scripts.FINISH(self._redis, keys=names, args=args))

    async def get(self, tenant: str, file_id: str) -> FileRecord:
        """Return the record of a file. Raises `NotFound`, `CorruptRecord`."""
        if not FILE_ID.fullmatch(file_id):
            raise _not_found(file_id)
        with translate_errors():
            fields: Any = await self._redis.hgetall(keys.file_record(tenant, file_id))
        if not fields:
            raise _not_found(file_id)
        return _from_fields(tenant, file_id, fields)

    async def content(self, tenant: str, file_id: str) -> bytes:
        """Return all bytes, verified. Raises `NotFound`, `CorruptRecord`."""
        record = await self.get(tenant, file_id)
        buffer = io.BytesIO()
        async for piece in self._pieces(record):
            buffer.write(piece)
        content = buffer.getvalue()  # without a copy
        await self._check(record, await asyncio.to_thread(_sha256, content))
        return content

    async def verified_pieces(self, tenant: str, file_id: str) -> AsyncIterator[bytes]:
        """Verify the whole content, then return it in pieces that are read when the caller needs them.

        For callers that may consume it slowly. Raises `NotFound`, `CorruptRecord`.
        """
        record = await self.get(tenant, file_id)
        digest = hashlib.sha256()
        async for piece in self._pieces(record):
            await asyncio.to_thread(digest.update, piece)
        await self._check(record, digest.hexdigest())
        return self._pieces(record)

    async def _pieces(self, record: FileRecord) -> AsyncIterator[bytes]:
        key = keys.file_content(record.tenant, record.file_id)
        for start in range(0, record.bytes, CHUNK_BYTES):
            with translate_errors():
                piece: Any = await self._redis.getrange(key, start, start + CHUNK_BYTES - 1)
            yield piece

    async def _check(self, record: FileRecord, digest: str) -> None:
        """Raise `CorruptRecord` if the digest differs, `NotFound` if the file was deleted meanwhile."""
        if digest != record.sha256:
            await self.get(record.tenant, record.file_id)  # raises NotFound
            raise CorruptRecord(f"the content of {record.file_id} does not match its checksum")

    async def delete(self, tenant: str, file_id: str) -> bool:
        """Delete the file. Return False if there is no such file."""
        if not FILE_ID.fullmatch(file_id):
            return False
        return bool(await file_scripts.DELETE(self._redis, keys=_names(tenant, file_id), args=[file_id]))

    async def list(
        self,
        tenant: str,
        *,
        after: str | None = None,
        limit: int = 20,
        purpose: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[_Records, bool]:
        """Return a page of files ordered by time of upload, and whether more follow.

        purpose: list only files with this purpose. Raises `NotFound` if the file `after` no longer exists.
        """
        if after is not None and not FILE_ID.fullmatch(after):
            raise _not_found(after, param="after")
        index, found = keys.file_index(tenant), _Records()
        while len(found) <= limit:
            ids = await file_scripts.PAGE(self._redis, keys=[index], args=[after or "", _PAGE_SIZE, order])
            if ids is None:
                raise _not_found(after or "", param="after")
            if not ids:
                break
            names = [file_id.decode() for file_id in ids]
            found += [r for r in await self._records(tenant, names) if purpose in (None, r.purpose)]
            after = names[-1]
        return found[:limit], len(found) > limit

    async def _records(self, tenant: str, file_ids: Sequence[str]) -> _Records:
        """Return the records that still exist, and remove expired files from the index.

        The last id stays in the index even if it has expired, because the next page continues after it.
        """
        with translate_errors():
            pipeline = self._redis.pipeline(transaction=False)
            for file_id in file_ids:
                pipeline.hgetall(keys.file_record(tenant, file_id))
            hashes = await pipeline.execute()
            found = dict(zip(file_ids, hashes, strict=True))
            expired = [file_id for file_id in file_ids[:-1] if not found[file_id]]
            if expired:
                await self._redis.zrem(keys.file_index(tenant), *expired)
        return [_from_fields(tenant, file_id, fields) for file_id, fields in found.items() if fields]


def _names(tenant: str, file_id: str) -> list[str]:
    return [keys.file_record(tenant, file_id), keys.file_content(tenant, file_id), keys.file_index(tenant)]


def _to_fields(record: FileRecord) -> list[str | int | float]:
    """Flatten the record to field, value, field, value …, without the fields that are None."""
    flat: list[str | int | float] = []
    for name, value in asdict(record).items():
        if name not in ("file_id", "tenant") and value is not None:
            flat += [name, value]
    return flat


def _from_fields(tenant: str, file_id: str, fields: Mapping[bytes, bytes]) -> FileRecord:
    try:
        num_examples, expires_at = fields.get(b"num_examples"), fields.get(b"expires_at")
        content_kind = fields.get(b"content_kind")
        return FileRecord(
            file_id=file_id,
            tenant=tenant,
            filename=fields[b"filename"].decode(),
            purpose=fields[b"purpose"].decode(),
            bytes=int(fields[b"bytes"]),
            created_at=float(fields[b"created_at"]),
            num_examples=None if num_examples is None else int(num_examples),
            sha256=fields[b"sha256"].decode(),
            expires_at=None if expires_at is None else int(expires_at),
            content_kind=None if content_kind is None else content_kind.decode(),
        )
    except (ValueError, KeyError) as error:
        raise CorruptRecord(f"the record of {file_id} in the store cannot be read: {error!r}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of(source: BinaryIO) -> str:
    source.seek(0)
    digest = hashlib.sha256()
    while piece := source.read(CHUNK_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def _not_found(file_id: str, *, param: str = "file_id") -> NotFound:
    return NotFound(f"there is no file {file_id!r}", param=param, code="file_not_found")
