"""Adapters that are stored as trained numbers reach the engine as the R that they stand for."""

from __future__ import annotations

import asyncio

import pytest
import torch
from redis.asyncio import Redis

from service.engine.adapters.packed_adapter import PackedAdapter, SlotFormat
from service.engine.process.adapter_fetcher import StoreReader, TrainedNumbers
from tessera.errors import BasisMismatch, CorruptRecord, InvalidInput, NotFound
from tessera.formats.adapter import HEADER_BYTES, Adapter, holds_trained_numbers, read_header
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.redis import keys
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore

SHAPES = [ModuleShape("a", 12, 9), ModuleShape("b", 9, 12), ModuleShape("c", 12, 12)]
RANK, NUMBERS = 4, 5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def basis() -> Basis:
    factors = {shape: (random(RANK, shape.d_in), random(shape.d_out, RANK)) for shape in SHAPES}
    core = {"kind": "spanned", "num_vectors": NUMBERS, "groups": [0, 0, 1]}
    projection = random(3, NUMBERS, RANK, RANK, seed=1)
    return make_basis(
        model_id="0" * 64, method="tinylora", factors=factors, recipe={}, core=core, projection=projection
    )


def adapter(made: Basis, seed: int) -> Adapter:
    v = random(*made.cores.shape, seed=seed).half().float()
    return Adapter(made.basis_id, made.cores.expand(v.double()).float(), {"seed": seed}, trained=v)


async def test_they_are_read_with_their_basis_which_is_read_once(redis: Redis) -> None:
    made, adapters, bases = basis(), AdapterStore(redis), BasisStore(redis)
    await bases.put(made)
    plain = Adapter(made.basis_id, random(3, RANK, RANK, seed=9))
    for name, stored in (("anna", adapter(made, 2)), ("ben", adapter(made, 3)), ("core", plain)):
        await adapters.publish("t", name, stored, dtype=torch.float16)
    refs = [await adapters.resolve("t", name) for name in ("anna", "core", "ben")]
    reader = StoreReader(adapters, bases, SlotFormat(torch.float32))

    found = await reader.read_adapters(refs)
    assert [type(item) for item in found] == [TrainedNumbers, PackedAdapter, TrainedNumbers]
    numbers = [item for item in found if isinstance(item, TrainedNumbers)]
    expanded = await asyncio.gather(*map(reader.expand, numbers))
    for packed, seed in zip(expanded, (2, 3), strict=True):
        assert isinstance(packed, PackedAdapter)
        torch.testing.assert_close(packed.R, adapter(made, seed).R, rtol=1e-6, atol=1e-6)

    for key in [key async for key in redis.scan_iter(match="*basis*")]:
        await redis.delete(key)
    again = await reader.expand(numbers[0])
    assert isinstance(again, PackedAdapter)


async def test_without_their_basis_only_their_requests_fail(redis: Redis) -> None:
    made, adapters, bases = basis(), AdapterStore(redis), BasisStore(redis)
    await adapters.publish("t", "anna", adapter(made, 2), dtype=torch.float16)
    reader = StoreReader(adapters, bases, SlotFormat(torch.float32))
    [found] = await reader.read_adapters([await adapters.resolve("t", "anna")])
    assert isinstance(found, TrainedNumbers)
    assert isinstance(await reader.expand(found), NotFound)
    await bases.put(made)  # a failure is not kept
    assert isinstance(await reader.expand(found), PackedAdapter)


async def test_a_damaged_record_is_an_error(redis: Redis) -> None:
    made, adapters, bases = basis(), AdapterStore(redis), BasisStore(redis)
    await bases.put(made)
    await adapters.publish("t", "anna", adapter(made, 2), dtype=torch.float32)
    ref = await adapters.resolve("t", "anna")
    key = keys.adapter_blob("t", "anna", 1)
    blob = await redis.get(key)
    await redis.set(key, blob[:-4] + b"\0\0\0\1")
    reader = StoreReader(adapters, bases, SlotFormat(torch.float32))
    [found] = await reader.read_adapters([ref])
    assert isinstance(found, TrainedNumbers)
    assert isinstance(await reader.expand(found), CorruptRecord)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_the_packed_form_holds_the_numbers_alone(dtype: torch.dtype) -> None:
    made = basis()
    stored = adapter(made, 2)
    blob = stored.to_bytes(version=7, dtype=dtype)
    kept = torch.float16 if dtype == torch.int8 else dtype
    header = read_header(blob)
    assert holds_trained_numbers(blob)
    assert (header.dtype, header.rank, header.num_modules) == (kept, RANK, 3)
    assert len(blob) == HEADER_BYTES + header.metadata_bytes + kept.itemsize * 2 * NUMBERS
    again = Adapter.from_bytes(blob, basis_id=made.basis_id, cores=made.cores)
    assert again.metadata == {"seed": 2}
    tolerance = 0.2 if kept == torch.bfloat16 else 1e-6
    torch.testing.assert_close(again.R, stored.R, rtol=tolerance, atol=tolerance)
    assert again.to_bytes(version=7, dtype=dtype) == blob


def test_they_are_refused_with_another_basis_or_none() -> None:
    made = basis()
    blob = adapter(made, 2).to_bytes(version=1)
    with pytest.raises(InvalidInput, match="stored as trained numbers of basis"):
        Adapter.from_bytes(blob)
    with pytest.raises(BasisMismatch):
        Adapter.from_bytes(blob, basis_id="1" * 64, cores=made.cores)
    with pytest.raises(BasisMismatch):
        Adapter.of_version(AdapterRef("t", "a", 1, "1" * 64), blob, made.cores)
    free = make_basis(
        model_id="0" * 64,
        method="x",
        factors={s: (random(4, s.d_in), random(s.d_out, 4)) for s in SHAPES},
        recipe={},
    )
    with pytest.raises(CorruptRecord, match="holds 10 trained numbers"):
        Adapter.from_bytes(blob, cores=free.cores)
    for place in range(8):
        with pytest.raises(CorruptRecord):
            Adapter.from_bytes(
                blob[:place] + bytes([blob[place] ^ 0x40]) + blob[place + 1 :], cores=made.cores
            )
    with pytest.raises(CorruptRecord):
        Adapter.from_bytes(blob[:-1], cores=made.cores)


def test_a_basis_of_tomorrow_is_named() -> None:
    factors = {s: (random(4, s.d_in), random(s.d_out, 4)) for s in SHAPES}
    strange = make_basis(model_id="0", method="x", factors=factors, recipe={}, core={"kind": "quantum"})
    with pytest.raises(CorruptRecord, match="quantum"):
        _ = strange.cores
