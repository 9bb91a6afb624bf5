"""API keys: which tenant a request belongs to. Only SHA-256 digests of the keys are stored.

A key has 32 random bytes, so a plain digest is enough: a key cannot be guessed, and a slow hash would gain
nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from pathlib import Path

from service.errors import Unauthenticated
from tessera.errors import InvalidInput
from tessera.redis.keys import TENANT_ID

#: The tenant of every request when no keys are configured.
DEFAULT_TENANT = "default"

_DIGEST = re.compile(r"[0-9a-f]{64}")

#: Digests are looked up by their first 8 hex digits, so that 100,000 keys cost no more than one. The prefix
#: of a SHA-256, which timing may reveal, does not help to find a key. The whole is compared in constant time.
_PREFIX = 8


class ApiKeys:
    """The known keys. digests: SHA-256 of a key in hex -> its tenant; None accepts every request."""

    def __init__(self, digests: dict[str, str] | None) -> None:
        self._is_open = digests is None
        self._by_prefix: dict[str, list[tuple[str, str]]] = {}
        for digest, tenant in (digests or {}).items():
            self._by_prefix.setdefault(digest[:_PREFIX], []).append((digest, tenant))

    @classmethod
    def load(cls, path: Path | None) -> ApiKeys:
        """Read a file of lines `<tenant> <sha256 hex>` (with # comments), or a JSON object {tenant: [sha256
        hex]}.

        Raises `InvalidInput` that names the line, because a key file must not be read
        only in part.
        """
        if path is None:
            return cls(None)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _bad_file(f"cannot read {path}: {error}") from error
        pairs = _from_json(text) if text.lstrip().startswith("{") else _from_lines(text)
        digests: dict[str, str] = {}
        for where, tenant, digest in pairs:
            if not TENANT_ID.fullmatch(tenant) or not _DIGEST.fullmatch(digest):
                raise _bad_file(f"{where} does not hold a tenant id and a SHA-256 digest in hex")
            if digests.setdefault(digest, tenant) != tenant:
                raise _bad_file(f"{where} gives a key to a second tenant")
        if not digests:
            raise _bad_file(f"{path} holds no key")
        return cls(digests)

    def tenant_of(self, authorization: str | None) -> str:
        """Return the tenant of the key in an Authorization header. Raises `Unauthenticated`."""
        if self._is_open:
            return DEFAULT_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated(
                "no API key: send it as `Authorization: Bearer <key>`", code="missing_api_key"
            )
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        for known, tenant in self._by_prefix.get(digest[:_PREFIX], []):
            if hmac.compare_digest(known, digest):
                return tenant
        raise Unauthenticated("the API key is not known")


def _from_lines(text: str) -> list[tuple[str, str, str]]:
    pairs = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#")[0].split()
        if words:
            tenant, digest = words if len(words) == 2 else ("", "")
            pairs.append((f"line {number}", tenant, digest))
    return pairs


def _from_json(text: str) -> list[tuple[str, str, str]]:
    try:
        tenants = json.loads(text)
    except ValueError as error:
        raise _bad_file(f"not JSON: {error}") from error
    if not all(isinstance(digests, list) for digests in tenants.values()):
        raise _bad_file("the JSON form maps each tenant to a list of digests")
    return [(f"tenant {name!r}", name, str(digest)) for name, listed in tenants.items() for digest in listed]


def _bad_file(reason: str) -> InvalidInput:
    return InvalidInput(f"API key file: {reason}", param="TESSERA_SERVICE_API_KEYS_FILE")
