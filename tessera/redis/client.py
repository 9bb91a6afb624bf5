"""The connection to Redis or Valkey: explicit time-outs, bounded retries, scripts, one place for its errors.

Knows nothing of adapters or jobs. Everything is portable to Redis >= 7.0 and Valkey >= 7.2, alone or as a
cluster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    ClusterError,
    ConnectionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    ResponseError,
    TimeoutError,
)

from tessera.errors import InvalidInput, StoreFull, StoreUnavailable

#: What the stores accept: one server, or a cluster (every script's keys share one hash tag, see `keys.py`).
Client = Redis | RedisCluster
Argument = bytes | str | int | float

#: One process holds at most this many connections; a caller beyond them waits up to its time-out. Each costs
#: 1 ms of handshakes when it is first needed: 64 requests at once on 64 new ones took 59 ms, on 16 18 ms (and
#: 3.8 and 4.7 ms when they were open).
MAX_CONNECTIONS = 16
#: Taken from a connection at a time. 256 adapters of 115 kB by 16 commands at once: 30 ms; by 64 KiB 43 ms.
READ_BYTES = 2**20
#: A connection idle for longer is probed before it is used: its server may have been replaced.
HEALTH_CHECK_INTERVAL_S = 15
#: Refused or cut connections and a server that still loads its data are tried again after 50, 100, 200, 400
#: and 500 ms, so a restart of the local server goes unnoticed (130 ms when empty; a publish right after a
#: kill -9 took 500 to 740 ms with 57 MB of data on a busy machine). A time-out is not tried again: redis-py's
#: defaults (10 retries of 5 s) hold a request for over 40 s behind a stalled server.
MAX_RETRIES = 5
_BACKOFF_BASE_S, _BACKOFF_CAP_S = 0.025, 0.5

#: First words of replies that mean "not now", for which redis-py has no exception of its own.
_TRANSIENT_REPLIES = (
    "BUSY ", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "READONLY", "TRYAGAIN",
)  # fmt: skip


def connect(url: str, *, timeout_s: float = 2.0) -> Redis:
    """A client of the server at a redis://, rediss:// or unix:// URL; connects on first use, gives bytes.

    timeout_s bounds the connect, each read, and the wait for a free connection, so a blocking command (BLPOP)
    must ask for less than that. Retries mean that a write may run twice if its connection breaks before the
    reply: scripts must be idempotent. A RESP2-only proxy is reached with `?protocol=2`. Raises `InvalidInput`
    for a malformed URL.
    """
    backoff = ExponentialBackoff(base=_BACKOFF_BASE_S, cap=_BACKOFF_CAP_S)
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=_RetryUnlessTimedOut(backoff, MAX_RETRIES, supported_errors=(ConnectionError,)),
            health_check_interval=HEALTH_CHECK_INTERVAL_S,
            protocol=3,
            socket_read_size=READ_BYTES,
        )
    except ValueError as error:
        raise InvalidInput(f"store URL: {error}", param="TESSERA_STORE_URL") from error
    return Redis.from_pool(pool)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn Redis' errors into ours: `StoreUnavailable` (try again later) and `StoreFull` (at maxmemory).

    Other errors (a wrong type, a script that fails) are bugs and pass unchanged.
    """
    try:
        yield
    except OutOfMemoryError as error:
        raise StoreFull(f"the store is full: {error}") from error
    except (ConnectionError, TimeoutError, ReadOnlyError, ClusterError) as error:
        raise StoreUnavailable(f"the store does not answer: {_describe(error)}") from error
    except RedisClusterException as error:
        raise StoreUnavailable(f"the store's cluster does not answer: {_describe(error)}") from error
    except ResponseError as error:
        if str(error).startswith(_TRANSIENT_REPLIES):
            raise StoreUnavailable(f"the store refuses for now: {error}") from error
        raise


class Script:
    """One Lua script: an atomic step. Sent by its SHA-1, and in full to a server that does not know it yet.

    A script declares every key it touches (KEYS), all of one hash tag, and may run twice to the same effect.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha1 = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, redis: Client, *, keys: Sequence[str], args: Sequence[Argument] = ()) -> Any:
        """The script's reply. Raises `StoreUnavailable`, `StoreFull`."""
        with translate_errors():
            try:
                return await redis.evalsha(self.sha1, len(keys), *keys, *args)
            except NoScriptError:
                return await redis.eval(self.source, len(keys), *keys, *args)


class _RetryUnlessTimedOut(Retry):
    """redis-py wraps a time-out during its handshake into a ConnectionError; without this it is retried."""

    async def call_with_retry(self, do: Callable[[], Awaitable[Any]], *args: Any, **options: Any) -> Any:
        async def attempt() -> Any:
            try:
                return await do()
            except ConnectionError as error:
                if isinstance(error.__cause__, TimeoutError):
                    raise error.__cause__ from None
                raise

        return await super().call_with_retry(attempt, *args, **options)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
