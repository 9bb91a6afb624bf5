"""The connection to Redis or Valkey: explicit time-outs, bounded retries, scripts, translated errors.

It knows nothing of adapters or jobs. Everything works on Redis >= 7.0 and Valkey >= 7.2, as one server or as
a cluster.
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

#: The clients that the stores accept: of one server, or of a cluster. All keys of a script share one hash tag
#: (see `keys.py`).
Client = Redis | RedisCluster
Argument = bytes | str | int | float

#: Connections of one process. If all are in use, a caller waits up to its time-out. The first use of a
#: connection costs 1 ms of handshakes: 64 requests at once took 59 ms over 64 new connections and 18 ms over
#: 16 (3.8 and 4.7 ms when the connections were open).
MAX_CONNECTIONS = 16
#: Bytes read from a connection at a time. Fetching 256 adapters of 115 kB with 16 commands at once takes 30
#: ms; with 64 KiB at a time it takes 43 ms.
READ_BYTES = 2**20
#: A connection that was idle for longer is probed before use, because its server may have been replaced.
HEALTH_CHECK_INTERVAL_S = 15
#: If a connection is refused or broken, or the server is still loading its data, the command is retried after
#: 50, 100, 200, 400 and 500 ms. So a restart of the local server goes unnoticed: it takes 130 ms when the
#: server is empty, and a publish right after a kill -9 took 500 to 740 ms with 57 MB of data on a busy
#: machine. A time-out is not retried: redis-py's defaults (10 retries of 5 s) hold a request for over 40 s
#: behind a stalled server.
MAX_RETRIES = 5
_BACKOFF_BASE_S, _BACKOFF_CAP_S = 0.025, 0.5

#: First words of error replies that mean "not now". redis-py has no exceptions for them.
_TRANSIENT_REPLIES = (
    "BUSY ", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "READONLY", "TRYAGAIN",
)  # fmt: skip


def connect(url: str, *, timeout_s: float = 2.0) -> Redis:
    """Make a client of the server at a redis://, rediss:// or unix:// URL. It connects on first use.

    Replies are bytes. timeout_s bounds the connect, each read, and the wait for a free connection, so a
    blocking command (BLPOP) must block for less than that. If a connection breaks before the reply, the retry
    may run a write twice, so scripts must be idempotent. Add `?protocol=2` for a proxy that knows only RESP2.
    Raises `InvalidInput` for a malformed URL.
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
        raise InvalidInput(f"TESSERA_STORE_URL is malformed: {error}", param="TESSERA_STORE_URL") from error
    return Redis.from_pool(pool)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn errors of Redis into `StoreUnavailable` (try again later) and `StoreFull` (at maxmemory).

    Other errors, such as a wrong type or a failing script, are bugs and pass unchanged.
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
            raise StoreUnavailable(f"the store refuses commands at the moment: {error}") from error
        raise


class Script:
    """One Lua script, which is one atomic step.

    It is sent by its SHA-1, and in full to a server that does not know it yet. A script declares every key
    that it touches (KEYS), all with one hash tag. Running it twice must have the same effect as running it
    once.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha1 = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, redis: Client, *, keys: Sequence[str], args: Sequence[Argument] = ()) -> Any:
        """Run the script and return its reply. Raises `StoreUnavailable`, `StoreFull`."""
        with translate_errors():
            try:
                return await redis.evalsha(self.sha1, len(keys), *keys, *args)
            except NoScriptError:
                return await redis.eval(self.source, len(keys), *keys, *args)


class _RetryUnlessTimedOut(Retry):
    """Does not retry a time-out during the handshake, which redis-py wraps in a ConnectionError."""

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
