"""Creating a thing once, although the request to create it comes twice.

There are two kinds of repetition. A caller repeats its `Idempotency-Key`; or OpenAI's client, which sends no
key, says in `x-stainless-retry-count` that a request is a retry, namely of the newest request with the same
body. Either way the creator gets a key under which it remembers what it has created.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from tessera.errors import InvalidInput
from tessera.redis import keys
from tessera.redis.client import Client, translate_errors

#: OpenAI's client stops retrying long before this.
RETRY_WINDOW_S = 600
MAX_KEY_LENGTH = 255

T = TypeVar("T")
#: Creates under a key, or returns what was created under it before.
Create = Callable[[str], Awaitable[T]]


@dataclass(frozen=True)
class Repetition:
    """The headers of a request that mark a repetition of an earlier one."""

    #: The `Idempotency-Key` header.
    key: str | None
    #: Whether OpenAI's client sends this request again.
    is_retry: bool


class Idempotency:
    """Remembers what creation requests were about, per tenant."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis

    async def create_once(
        self, tenant: str, repetition: Repetition, fingerprint: str, create: Create[T], *, scope: str = ""
    ) -> T:
        """Create, or return what the request created when it came before.

        fingerprint: equal for equal requests. scope: the kind of thing that is created, each
        of which has its own keys. Raises `InvalidInput` if the key came with another fingerprint before.
        """
        if repetition.key is not None:
            return await self._by_key(tenant, repetition.key, fingerprint, create, scope)
        return await self._by_body(tenant, fingerprint, create, repetition.is_retry)

    async def _by_key(self, tenant: str, key: str, body: str, create: Create[T], scope: str) -> T:
        """Create under the caller's key, once. A request that fails leaves its key unused."""
        if not 0 < len(key) <= MAX_KEY_LENGTH:
            raise InvalidInput(
                f"an Idempotency-Key has 1 to {MAX_KEY_LENGTH} characters", param="Idempotency-Key"
            )
        created, digest = await create(f"key:{key}"), _digest("body", body)
        name = keys.idempotency(tenant, _digest(f"{scope}key", key))
        with translate_errors():
            first = await self._redis.set(name, digest, nx=True, get=True, ex=keys.IDEMPOTENCY_TTL_S)
        if isinstance(first, bytes) and first.decode() != digest:
            raise InvalidInput(
                "this Idempotency-Key was used for a different request; use a new key",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return created

    async def _by_body(self, tenant: str, body: str, create: Create[T], is_retry: bool) -> T:
        """Create a new object. A retry returns what the newest request with the same body created."""
        name, nonce = keys.idempotency(tenant, _digest("body", body)), secrets.token_hex(16)
        with translate_errors():
            if is_retry:
                newest = await self._redis.set(name, nonce, nx=True, get=True, ex=RETRY_WINDOW_S)
                nonce = newest.decode() if isinstance(newest, bytes) else nonce
            else:
                await self._redis.set(name, nonce, ex=RETRY_WINDOW_S)
        return await create(f"body:{nonce}")


def _digest(kind: str, value: str) -> str:
    return hashlib.sha256(f"{kind}\n{value}".encode()).hexdigest()
