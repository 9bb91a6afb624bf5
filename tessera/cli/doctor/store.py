"""The store: whether it answers, is new enough, keeps acknowledged writes, and evicts keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from tessera.cli.doctor.findings import Finding, ok, problem, warning
from tessera.errors import TesseraError
from tessera.redis.binary import find_binary, server_version
from tessera.redis.client import connect
from tessera.redis.embedded import answers, socket_path
from tessera.settings import CommonSettings

#: The oldest servers with every command that Tessera uses.
MIN_REDIS, MIN_VALKEY = (7, 0), (7, 2)
_SLOW_MS = 5.0


@dataclass(frozen=True)
class StoreFacts:
    """The facts that a server reports about itself. None: it does not let this user read that."""

    kind: str
    version: str
    role: str
    round_trip_ms: float
    has_log: bool
    #: Whether the last write to the append-only file succeeded.
    log_is_written: bool
    #: The times of snapshots, as `CONFIG GET save` returns them; "" for never.
    snapshots: str | None
    max_memory_bytes: int
    used_memory_bytes: int
    eviction: str


def check(settings: CommonSettings) -> Iterator[Finding]:
    """Yield findings about the store that these settings name, or about the embedded one."""
    try:
        url = settings.store_url_with_password()
    except TesseraError as error:
        yield problem(
            "store", error.message, "write the store's password into the file, or unset the setting"
        )
        return
    if url is None:
        socket = socket_path(settings.data_dir.resolve() / "store")
        if not answers(socket):
            yield _embedded()
            return
        url = f"unix://{socket}"
    name = redacted(url)
    try:
        facts = asyncio.run(look(url, timeout_s=settings.store_timeout_s))
    except AuthenticationError as error:
        yield problem(
            "store",
            f"{name} refuses the user or password: {error}",
            "put the password into a file and name it with TESSERA_STORE_PASSWORD_FILE, "
            "and the user into the URL: redis://USER@HOST",
        )
    except NoPermissionError as error:
        yield warning(
            "store",
            f"{name} answers, but does not let this user ask for INFO: {error}",
            "grant it `+info +ping` to have version, persistence and eviction checked",
        )
    except (RedisError, OSError, TesseraError) as error:
        yield problem(
            "store",
            f"{name} does not answer: {error}",
            "start the server, or correct TESSERA_STORE_URL; unset it for an embedded store",
        )
    else:
        yield from judge(name, facts)


async def look(url: str, *, timeout_s: float) -> StoreFacts:
    """Query the server. Raises the errors of redis-py, and `InvalidInput` for a malformed URL."""
    async with connect(url, timeout_s=timeout_s) as redis:
        await redis.ping()
        started = time.perf_counter()
        await redis.ping()
        round_trip_ms = (time.perf_counter() - started) * 1000
        info: dict[str, Any] = {}
        for section in ("server", "memory", "persistence", "replication"):
            info |= await redis.info(section)
        return StoreFacts(
            kind="Valkey" if "valkey_version" in info else "Redis",
            version=str(info.get("valkey_version") or info.get("redis_version", "0")),
            role=str(info.get("role", "master")),
            round_trip_ms=round_trip_ms,
            has_log=bool(info.get("aof_enabled", 0)),
            log_is_written=info.get("aof_last_write_status", "ok") == "ok",
            snapshots=await _snapshots(redis),
            max_memory_bytes=int(info.get("maxmemory", 0)),
            used_memory_bytes=int(info.get("used_memory", 0)),
            eviction=str(info.get("maxmemory_policy", "noeviction")),
        )


async def _snapshots(redis: Redis) -> str | None:
    try:
        return str((await redis.config_get("save")).get("save", ""))
    except ResponseError:  # many providers, and our own deployment, forbid CONFIG
        return None


def judge(name: str, facts: StoreFacts) -> Iterator[Finding]:
    """Yield the findings that follow from these facts. name: the store's URL without its password."""
    yield _version(name, facts)
    if facts.role != "master":
        yield problem(
            "store",
            f"it is a replica (role {facts.role}), which refuses writes",
            "point TESSERA_STORE_URL at the primary",
        )
    yield _persistence(facts)
    yield _eviction(facts)


def _version(name: str, facts: StoreFacts) -> Finding:
    needed = MIN_VALKEY if facts.kind == "Valkey" else MIN_REDIS
    what = f"{facts.kind} {facts.version} at {name}"
    if _numbers(facts.version) < needed:
        wanted = ".".join(map(str, needed))
        return problem("store", f"{what} is too old", f"run {facts.kind} {wanted} or newer")
    if facts.round_trip_ms > _SLOW_MS:
        return warning(
            "store",
            f"{what}, a round trip takes {facts.round_trip_ms:.1f} ms",
            "run the store near the service: loading an adapter waits for one round trip",
        )
    return ok("store", f"{what}, a round trip takes {facts.round_trip_ms:.1f} ms")


def _persistence(facts: StoreFacts) -> Finding:
    if facts.has_log and not facts.log_is_written:
        return problem(
            "store", "it fails to write its append-only file", "read its log; its disk may be full"
        )
    if facts.has_log:
        return ok("store", "it writes an append-only file")
    if facts.snapshots:
        return warning(
            "store",
            "it keeps snapshots only: a crash loses every adapter and job since the last one",
            "set `appendonly yes` and `appendfsync everysec`, as deploy/valkey/valkey.conf does",
        )
    kept = "it may not keep" if facts.snapshots is None else "it keeps"
    kept += " anything on disk" if facts.snapshots is None else " nothing on disk"
    return warning(
        "store",
        f"{kept}: adapters and jobs are lost when it stops",
        "set `appendonly yes` and `appendfsync everysec`, as deploy/valkey/valkey.conf does",
    )


def _eviction(facts: StoreFacts) -> Finding:
    limit = f"{_mib(facts.used_memory_bytes)} of {_mib(facts.max_memory_bytes)}"
    if facts.max_memory_bytes == 0:
        limit = f"{_mib(facts.used_memory_bytes)}, no limit (maxmemory 0)"
    if facts.eviction == "noeviction":
        return ok("store", f"it evicts nothing (noeviction); memory {limit}")
    finding = problem if facts.max_memory_bytes else warning
    return finding(
        "store",
        f"maxmemory-policy is {facts.eviction}: when memory is full it drops adapters or jobs silently; "
        f"memory {limit}",
        "set `maxmemory-policy noeviction`: writes are then refused instead",
    )


def _embedded() -> Finding:
    try:
        binary = find_binary()
    except TesseraError as error:
        message, _, advice = error.message.partition(": ")
        return problem("store", message, advice)
    version = ".".join(map(str, server_version(binary) or ()))
    return ok("store", f"an embedded one is started when it is needed: {binary} {version}")


def redacted(url: str) -> str:
    """Return the URL without its password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}@{host}"))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _mib(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB"
