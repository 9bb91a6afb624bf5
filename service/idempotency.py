"""Creating a thing once, although the request to create it comes twice.

Two kinds of repetition: a caller that repeats its `Idempotency-Key`, and OpenAI's client, which sends no key
but says in `x-stainless-retry-count` that a request is a retry; what it retries is the newest request with
the same body. Either way the answer is a key under which the queue remembers its submissions.
"""

from __future__ import annotations

import hashlib
import secrets

from adapter_core import keys
from adapter_core.errors import InvalidInput
from adapter_core.redis_client import Client, translate_errors

#: OpenAI's client gives up retrying long before.
RETRY_WINDOW_S = 600
MAX_KEY_LENGTH = 255


class Idempotency:
    """Remembers what creation requests were about, per tenant."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis

    async def for_key(self, tenant: str, key: str, fingerprint: str) -> str:
        """The submission key for a caller's own key.

        Raises `InvalidInput` if the key came with another body before.
        """
        if not 0 < len(key) <= MAX_KEY_LENGTH:
            raise InvalidInput(
                f"an Idempotency-Key has 1 to {MAX_KEY_LENGTH} characters", param="Idempotency-Key"
            )
        name = keys.idempotency(tenant, _digest("key", key))
        with translate_errors():
            known = await self._redis.set(name, fingerprint, nx=True, get=True, ex=keys.IDEMPOTENCY_TTL_S)
        if isinstance(known, bytes) and known.decode() != fingerprint:
            raise InvalidInput(
                "this Idempotency-Key came with another request before",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return f"key:{key}"

    async def for_retry(self, tenant: str, fingerprint: str, *, is_retry: bool) -> str:
        """The submission key of a request without one: a retry gets that of the newest with the same body."""
        name = keys.idempotency(tenant, _digest("body", fingerprint))
        nonce = secrets.token_hex(16)
        with translate_errors():
            if is_retry:
                known = await self._redis.set(name, nonce, nx=True, get=True, ex=RETRY_WINDOW_S)
                return f"body:{known.decode() if isinstance(known, bytes) else nonce}"
            await self._redis.set(name, nonce, ex=RETRY_WINDOW_S)
        return f"body:{nonce}"


def fingerprint_of(body: str) -> str:
    """A digest of a request's body in canonical form."""
    return hashlib.sha256(body.encode()).hexdigest()


def _digest(kind: str, value: str) -> str:
    return hashlib.sha256(f"{kind}\n{value}".encode()).hexdigest()
