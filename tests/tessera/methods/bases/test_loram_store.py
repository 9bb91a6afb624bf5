"""LoRAM stores no factors (methods catalogue M5): through the real store, from the manifest alone."""

from __future__ import annotations

import dataclasses
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from redis.asyncio import Redis
from safetensors.torch import load

from service.jobs.exports import peft_zip
from tessera.errors import CorruptRecord
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis, storage_dtype
from tessera.formats.manifest import BasisManifest
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel
from tessera.redis import keys
from tessera.redis.client import connect
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore, ensure_basis
from tessera.store.ownership import PrivateBases
from tests.tessera.methods.matrices import small_model

RECIPE = {"method": "loram", "rank": 4, "target_modules": ["q_proj", "down_proj"]}


def assert_same_bits(actual: Basis, expected: Basis) -> None:
    assert actual.manifest == expected.manifest
    assert list(actual.module_bytes()) == list(expected.module_bytes())
    assert actual.preconditioner_bytes() == expected.preconditioner_bytes()


async def stored_parts(redis: Redis, basis_id: str) -> set[str]:
    """Which keys of a basis there are, by the last part of their names."""
    prefix = keys.basis_manifest(basis_id).removesuffix("manifest")
    return {key.decode().removeprefix(prefix) async for key in redis.scan_iter(match=f"{prefix}*")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_the_store_holds_the_manifest_and_nothing_else(redis: Redis, dtype: torch.dtype) -> None:
    """For everybody's basis, in 16 bits as others; a reader that never saw it gets the same bits."""
    base = small_model(dtype=dtype)
    built = await ensure_basis(BasisStore(redis), base, **RECIPE)

    assert await stored_parts(redis, built.basis_id) == {"manifest"}
    assert built.manifest.dtype == storage_dtype(dtype)
    read = await BasisStore(redis).get(built.basis_id)
    assert_same_bits(read, built)
    assert read.digest() == built.basis_id
    await redis.config_resetstat()
    assert_same_bits(await ensure_basis(BasisStore(redis), base, **RECIPE), built)
    assert "cmdstat_set" not in await redis.info("commandstats")


async def test_the_disk_holds_the_manifest_and_nothing_else(
    redis: Redis, small: BaseModel, tmp_path: Path
) -> None:
    store = BasisStore(redis, cache_dir=tmp_path)
    built = await ensure_basis(store, small, **RECIPE)
    await store.get(built.basis_id)

    path = tmp_path / f"{built.basis_id}.basis"
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_size == 8 + len(built.manifest.to_json())
    async with connect(f"unix://{tmp_path}/no-server") as nowhere:
        assert_same_bits(await BasisStore(nowhere, cache_dir=tmp_path).get(built.basis_id), built)
    path.write_bytes(path.read_bytes().replace(b'"rank":4', b'"rank":5'))
    assert_same_bits(await store.get(built.basis_id), built)


async def test_a_quota_counts_what_is_stored(redis: Redis, small: BaseModel) -> None:
    """Room for the manifest is enough, deleting the basis leaves nothing."""
    basis = build_basis(small, **RECIPE, rule="core")
    size = basis.manifest.stored_bytes
    assert size == len(basis.manifest.to_json())
    own, store = PrivateBases(redis, max_bytes=size), BasisStore(redis)

    ownership = await own.reserve("anna", basis.manifest)
    assert ownership is not None
    await store.put_private(basis, ownership)

    assert await own.of_tenant("anna") == {basis.basis_id: size}
    assert await stored_parts(redis, basis.basis_id) == {"manifest", "owners"}
    assert list((await store.get(basis.basis_id)).module_bytes()) == list(basis.module_bytes())
    await own.delete("anna", basis.basis_id)
    assert await stored_parts(redis, basis.basis_id) == set()


def with_other_bits(basis: Basis) -> str:
    """The manifest as a machine would have written it whose magnitudes differ a little."""
    s = [x * (1 + 1e-6) for x in basis.manifest.recipe["notes"]["s"]]
    recipe = {**basis.manifest.recipe, "notes": {"s": s}}
    return dataclasses.replace(basis.manifest, recipe=recipe).to_json()


async def test_other_bits_are_refused_and_stored_factors_are_the_way_out(
    redis: Redis, small: BaseModel
) -> None:
    store = BasisStore(redis)
    made, kept = build_basis(small, **RECIPE), build_basis(small, **RECIPE, store_factors=True)
    assert (made.basis_id, made.manifest.is_regenerated) == (kept.basis_id, True)
    assert kept.manifest.stored_bytes == kept.manifest.factor_bytes
    await store.put(made, recipe_key="made")
    await redis.set(keys.basis_manifest(made.basis_id), with_other_bits(made))
    with pytest.raises(CorruptRecord, match=rf"{made.basis_id} was.* has other bytes.*store_factors=true"):
        await store.get(made.basis_id)

    await store.keep_factors(kept)  # as a worker does whose own basis is everybody's already

    assert "preconditioner" in await stored_parts(redis, made.basis_id)
    await redis.set(keys.basis_manifest(kept.basis_id), with_other_bits(kept))
    read = await store.get(kept.basis_id)  # its magnitudes are a record now, no more
    assert list(read.module_bytes()) == list(made.module_bytes())


async def test_a_manifest_without_magnitudes_is_corrupt(redis: Redis, small: BaseModel) -> None:
    basis = build_basis(small, **RECIPE)
    for notes in ({}, {"s": ["1"]}, {"s": [-1.0] * 4}, {"s": [1.0]}):
        recipe = {**basis.manifest.recipe, "notes": notes}
        manifest: BasisManifest = dataclasses.replace(basis.manifest, recipe=recipe)
        await redis.set(keys.basis_manifest(basis.basis_id), manifest.to_json())
        with pytest.raises(CorruptRecord, match=basis.basis_id):
            await BasisStore(redis).get(basis.basis_id)


async def test_an_adapter_in_it_is_exported(redis: Redis, small: BaseModel) -> None:
    store, adapters = BasisStore(redis), AdapterStore(redis)
    basis = await ensure_basis(store, small, **RECIPE)
    R = torch.randn(basis.num_modules, 4, 4, generator=torch.Generator().manual_seed(1))
    await adapters.publish("default", "anna", Adapter(basis.basis_id, R), dtype=torch.float32)

    content = await peft_zip(
        adapters, store, tenant="default", adapter_id="anna", version=None, base_model="small"
    )

    tensors = load(zipfile.ZipFile(io.BytesIO(content)).read("adapter_model.safetensors"))
    for index, module in enumerate(basis.manifest.modules):
        prefix = f"base_model.model.{module.name}"
        delta = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        expected = basis.B[index].float() @ R[index] @ basis.A[index].float()
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5)
