"""Bases in Redis: a manifest, one string per module and a preconditioner; and an index by recipe.

The index finds a basis by what it was built from (`recipe_key`); its id is a digest of its bytes. Factors are
written before the manifest and the manifest before the index entry, so a basis that can be found can be read
completely. A copy on the disk saves the transfer and is verified like the stored bytes. A basis that follows
from its manifest alone (LoRAM) is stored as that manifest, in Redis and on the disk: every reader computes
its factors again, and verifies them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tessera.errors import BasisDeleted, CorruptRecord, NotFound
from tessera.formats.basis import DTYPES, Basis, raw_bytes, storage_dtype
from tessera.formats.manifest import BasisManifest
from tessera.methods.bases import CalibrationSet, build_basis
from tessera.methods.bases.loram import regenerate
from tessera.model.base_model import BaseModel
from tessera.redis import keys
from tessera.redis.client import Client, translate_errors
from tessera.store import ownership_scripts
from tessera.store.manifests import BasisManifests, parse_manifest
from tessera.store.ownership import EVERYBODY, Ownership

log = logging.getLogger(__name__)

T = TypeVar("T")

#: A file of the disk cache consists of the length of the manifest, the manifest as JSON, and (unless the
#: factors follow from the manifest) the factors of each module and the preconditioner.
_LENGTH_BYTES = 8
_MAX_MANIFEST_BYTES = 64 * 1024 * 1024


def recipe_key(
    model_id: str,
    *,
    method: str,
    rank: int,
    target_modules: Sequence[str],
    calibration_digest: str | None = None,
    **options: Any,
) -> str:
    """Return the name of one way to build a basis. The order of patterns and options does not matter."""
    recipe: dict[str, Any] = {
        "model_id": model_id,
        "method": method,
        "rank": rank,
        "target_modules": sorted(set(target_modules)),
        "options": options,
    }
    if calibration_digest is not None:
        recipe["calibration"] = calibration_digest
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return f"{method}:{rank}:{digest}"


async def ensure_basis(
    store: BasisStore,
    base: BaseModel,
    *,
    method: str,
    rank: int,
    target_modules: Sequence[str],
    calibration: CalibrationSet | None = None,
    **options: Any,
) -> Basis:
    """Find the shared basis of this recipe, or build it in a thread and store it.

    Processes that do this at the same time end with the same basis. A stored basis that cannot be read is
    built again; if that gives the same bytes, the stored one is repaired. Raises `InvalidInput`,
    `UnsupportedModel`, `CorruptRecord`, `StoreUnavailable`, `StoreFull`.
    """
    recipe: dict[str, Any] = {"method": method, "rank": rank, "target_modules": target_modules, **options}
    digest = None if calibration is None else calibration.digest
    name = recipe_key(base.model_id, calibration_digest=digest, **recipe)
    found = await read_if_sound(store, await store.find(name))
    if found is not None:
        return found
    dtype = storage_dtype(base.model.dtype)
    built = await asyncio.to_thread(build_basis, base, calibration=calibration, dtype=dtype, **recipe)
    winner = await store.put(built, recipe_key=name)
    return built if winner == built.basis_id else await store.get(winner)


async def read_if_sound(store: BasisStore, basis_id: str | None) -> Basis | None:
    """Return the stored basis. None if there is no id, or if it cannot be read and should be built again."""
    if basis_id is None:
        return None
    try:
        return await store.get(basis_id)
    except (NotFound, CorruptRecord) as error:
        log.error("basis %s cannot be read and is built again: %s", basis_id, error)
        return None


class BasisStore(BasisManifests):
    """The bases of all base models.

    Every method raises `StoreUnavailable`; methods that write also raise `StoreFull`.
    """

    def __init__(self, redis: Client, *, cache_dir: Path | None = None) -> None:
        super().__init__(redis)
        self._cache = None if cache_dir is None else _DiskCache(cache_dir)

    async def put(self, basis: Basis, *, recipe_key: str | None = None) -> str:
        """Store a shared basis. Return the id that the recipe stands for, which may be an earlier basis."""
        basis_id = basis.basis_id
        name = f"id:{basis_id}" if recipe_key is None else recipe_key
        await self._share(basis_id)  # before the factors, so that no private owner deletes them
        await self._write(basis)
        await self._share(basis_id)  # a tenant may have become the first owner before the manifest was there
        with translate_errors():
            await self._redis.hsetnx(keys.basis_index(), name, basis_id)
            winner: Any = await self._redis.hget(keys.basis_index(), name)
        return str(winner.decode())

    async def _share(self, basis_id: str) -> None:
        """Make a basis that tenants own a shared one too."""
        with translate_errors():
            if await self._redis.exists(keys.basis_owners(basis_id)):
                await self._redis.hset(keys.basis_owners(basis_id), EVERYBODY, "")

    async def put_private(self, basis: Basis, ownership: Ownership, *, step: Tensor | None = None) -> None:
        """Store a private basis under the ownership that `PrivateBases.reserve` returned.

        No list shows a private basis, and no disk cache keeps it. step: [M, r, r], the first step that
        `build_basis_and_step` found with it. Raises `BasisDeleted` if the ownership has ended, in which case
        nothing of this call remains.
        """
        manifest = replace(basis.manifest, recipe={**basis.manifest.recipe, "is_own": True})
        if step is not None:
            content = {keys.basis_step(basis.basis_id): raw_bytes(step.float())}
            await self._set(basis.basis_id, content, ownership)
        await self._write(replace(basis, manifest=manifest), ownership)

    async def step(self, basis: Basis) -> Tensor | None:
        """Return the step that was stored with a private basis, [M, r, r] float32, or None."""
        with translate_errors():
            content: Any = await self._redis.get(keys.basis_step(basis.basis_id))
        shape = (basis.num_modules, basis.rank, basis.rank)
        if content is None or len(content) != 4 * math.prod(shape):
            return None
        return torch.frombuffer(bytearray(content), dtype=torch.float32).view(shape)

    async def keep_factors(self, basis: Basis) -> None:
        """Store the factors too, if the store holds only the manifest of this basis."""
        if not basis.manifest.is_regenerated and (await self.manifest(basis.basis_id)).is_regenerated:
            await self._write(basis)

    async def _write(self, basis: Basis, ownership: Ownership | None = None) -> None:
        basis_id, manifest = basis.basis_id, basis.manifest.to_json().encode()
        if not basis.manifest.is_regenerated:
            modules = ((keys.basis_module(basis_id, i), blob) for i, blob in enumerate(basis.module_bytes()))
            for batch in _batches(modules, basis.manifest):
                await self._set(basis_id, dict(batch), ownership)
            preconditioner = {keys.basis_preconditioner(basis_id): basis.preconditioner_bytes()}
            await self._set(basis_id, preconditioner, ownership)
        await self._set(basis_id, {keys.basis_manifest(basis_id): manifest}, ownership)

    async def _set(self, basis_id: str, content: dict[str, bytes], ownership: Ownership | None) -> None:
        """Write the keys of one basis. Raises `BasisDeleted` if the ownership has ended."""
        if ownership is not None:
            names, args = [keys.basis_owners(basis_id), *content], [ownership.tenant, ownership.token]
            if not await ownership_scripts.WRITE(self._redis, keys=names, args=[*args, *content.values()]):
                raise BasisDeleted(f"basis {basis_id} has been deleted", param="basis_id")
            return
        with translate_errors():
            pipeline = self._redis.pipeline(transaction=False)
            for key, value in content.items():
                pipeline.set(key, value)
            await pipeline.execute()

    async def get(self, basis_id: str) -> Basis:
        """Read a basis from the disk cache or the store, verified. Raises `NotFound`, `CorruptRecord`."""
        if self._cache is not None and keys.BASIS_ID.fullmatch(basis_id):
            cached = await asyncio.to_thread(self._cache.load, basis_id)
            if cached is not None:
                return cached
        manifest = await self.manifest(basis_id)
        if manifest.is_regenerated:
            basis = await asyncio.to_thread(regenerate, manifest)
        else:
            modules, preconditioner = await self._factors(manifest)
            basis = await asyncio.to_thread(Basis.from_bytes, manifest, modules, preconditioner)
        if self._cache is not None and not manifest.is_own:  # deleting a private basis must leave no copy
            await asyncio.to_thread(self._cache.save, basis)
        return basis

    async def _factors(self, manifest: BasisManifest) -> tuple[list[bytes], bytes]:
        basis_id = manifest.basis_id
        modules: list[Any] = []
        with translate_errors():
            names = (keys.basis_module(basis_id, i) for i in range(len(manifest.modules)))
            for batch in _batches(names, manifest):
                modules.extend(await self._redis.mget(batch))
            preconditioner: Any = await self._redis.get(keys.basis_preconditioner(basis_id))
        missing = [m.name for m, blob in zip(manifest.modules, modules, strict=True) if blob is None]
        if preconditioner is None:
            missing.append("preconditioner")
        if missing:
            await self.manifest(basis_id)  # raises NotFound if it was deleted between the two reads
            raise CorruptRecord(f"basis {basis_id} lacks {', '.join(missing[:5])} in the store")
        return modules, preconditioner


class _DiskCache:
    """Bases as files named by their digest. A file that fails verification is deleted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, basis_id: str) -> Basis | None:
        """Return the basis, or None if it is not cached or cannot be read."""
        path = self._folder / f"{basis_id}.basis"
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
                manifest = parse_manifest(basis_id, file.read(min(length, _MAX_MANIFEST_BYTES)))
                if manifest.is_regenerated:
                    return regenerate(manifest)
                modules = [file.read(size) for size in _module_sizes(manifest)]
                return Basis.from_bytes(manifest, modules, file.read())
        except FileNotFoundError:
            return None
        except (OSError, CorruptRecord) as error:
            log.warning("deleted the cached basis %s, which cannot be read: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def save(self, basis: Basis) -> None:
        """Save the basis if the disk allows it; a failure only costs a transfer next time."""
        manifest = basis.manifest.to_json().encode()
        part = self._folder / f"{basis.basis_id}.{secrets.token_hex(4)}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(len(manifest).to_bytes(_LENGTH_BYTES, "little") + manifest)
                if not basis.manifest.is_regenerated:
                    for blob in basis.module_bytes():
                        file.write(blob)
                    file.write(basis.preconditioner_bytes())
            part.replace(self._folder / f"{basis.basis_id}.basis")
        except OSError as error:
            log.warning("basis %s was not saved in the disk cache: %s", basis.basis_id, error)
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _module_sizes(manifest: BasisManifest) -> list[int]:
    """Return the bytes of A and B together, for each module."""
    item = DTYPES[manifest.dtype].itemsize
    return [manifest.rank * (m.d_in + m.d_out) * item for m in manifest.modules]


def _batches(items: Iterable[T], manifest: BasisManifest) -> Iterator[list[T]]:
    """Group per-module items, so that the factors of one group stay within MAX_MGET_BYTES."""
    size = max(1, keys.MAX_MGET_BYTES // max(_module_sizes(manifest)))
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
