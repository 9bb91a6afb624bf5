"""Finding bases in Redis and reading their manifests. Needs no torch."""

from __future__ import annotations

from typing import Any

from tessera.errors import CorruptRecord
from tessera.formats.manifest import ITEM_BYTES, BasisManifest
from tessera.redis import keys
from tessera.redis.client import Client, translate_errors
from tessera.store.ownership import basis_not_found


class BasisManifests:
    """The manifests of all bases. Every method raises `StoreUnavailable`."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis

    async def find(self, recipe_key: str) -> str | None:
        """Return the id of the shared basis of this recipe, None if it has not been built."""
        with translate_errors():
            basis_id: Any = await self._redis.hget(keys.basis_index(), recipe_key)
        return None if basis_id is None else basis_id.decode()

    async def manifest(self, basis_id: str) -> BasisManifest:
        """Read the manifest. Raises `NotFound`, `CorruptRecord`."""
        if not keys.BASIS_ID.fullmatch(basis_id):
            raise basis_not_found(basis_id)
        with translate_errors():
            text: Any = await self._redis.get(keys.basis_manifest(basis_id))
        if text is None:
            raise basis_not_found(basis_id)
        return parse_manifest(basis_id, text)

    async def preconditioner(self, basis_id: str) -> bytes:
        """Return P_in, P_out and more as raw bytes (`Basis.preconditioner_bytes`); b"" if none are stored."""
        with translate_errors():
            content: Any = await self._redis.get(keys.basis_preconditioner(basis_id))
        return content or b""

    async def list(self) -> list[BasisManifest]:
        """Return the manifests of all shared bases, ordered by model, method and rank."""
        with translate_errors():
            ids: Any = await self._redis.hvals(keys.basis_index())
        manifests = [await self.manifest(basis_id.decode()) for basis_id in sorted(set(ids))]
        return sorted(manifests, key=lambda m: (m.model_id, m.method, m.rank, m.basis_id))


def parse_manifest(basis_id: str, text: bytes) -> BasisManifest:
    """Parse the manifest stored for a basis. Raises `CorruptRecord`."""
    manifest = BasisManifest.from_json(text)
    if manifest.basis_id != basis_id or manifest.dtype not in ITEM_BYTES or not manifest.modules:
        raise CorruptRecord(f"the manifest stored for basis {basis_id} describes another basis, or none")
    return manifest
