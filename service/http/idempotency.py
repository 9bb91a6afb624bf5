"""Creating a thing once, although the request to create it comes twice.

Two kinds of repetition: a caller that repeats its `Idempotency-Key`, and OpenAI's client, which sends no key
but says in `x-stainless-retry-count` that a request is a retry; what it retries is the newest request with
the same body. Either way the creator gets a key under which it remembers what it has created.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tessera.errors import InvalidInput
from tessera.redis import keys
from tessera.redis.client import Client, translate_errors

#: OpenAI's client gives up retrying long before.
RETRY_WINDOW_S = 600
MAX_KEY_LENGTH = 255

T = TypeVar("T")
#: Creates under a key, or returns what was created under it before.
Create = Callable[[str], Awaitable[T]]


class Idempotency:
    """Remembers what creation requests were about, per tenant."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis

    async def by_key(self, tenant: str, key: str, body: str, create: Create[T], *, scope: str = "") -> T:
        """Create, or return what this key created before.

        scope: what is created; a key of one scope is not known in another.
        A request that fails leaves its key unused. Raises `InvalidInput` if the key came with another body.
        """
        if not 0 < len(key) <= MAX_KEY_LENGTH:
            raise InvalidInput(
                f"an Idempotency-Key has 1 to {MAX_KEY_LENGTH} characters", param="Idempotency-Key"
            )
        created, fingerprint = await create(f"key:{key}"), _digest("body", body)
        name = keys.idempotency(tenant, _digest(f"{scope}key", key))
        with translate_errors():
            first = await self._redis.set(name, fingerprint, nx=True, get=True, ex=keys.IDEMPOTENCY_TTL_S)
        if isinstance(first, bytes) and first.decode() != fingerprint:
            raise InvalidInput(
                "this Idempotency-Key came with another request before",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return created

    async def by_body(self, tenant: str, body: str, create: Create[T], *, is_retry: bool) -> T:
        """Create anew; a retry gets what the newest request with the same body created."""
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
