"""/v1/adapters/{id}/peft: a zip whose LoRA has the adapter's delta."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence

import httpx
import pytest
import torch
from redis.asyncio import Redis
from safetensors.torch import load

from service.jobs.exports import peft_zip
from tessera.errors import AdapterReplaced
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.redis import keys
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tests.service.conftest import publish, small_basis


async def test_the_zip_holds_a_lora_with_the_same_delta(
    client: httpx.AsyncClient, redis: Redis, adapters: AdapterStore
) -> None:
    basis = small_basis()
    await BasisStore(redis).put(basis)
    R = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    await adapters.publish("default", "anna", Adapter(basis.basis_id, R), dtype=torch.float32)
    await publish(adapters, "anna", basis_id=basis.basis_id)  # the active version is another one

    reply = await client.get("/v1/adapters/anna/peft?version=1")

    assert reply.headers["content-type"] == "application/zip"
    archive = zipfile.ZipFile(io.BytesIO(reply.content))
    config = json.loads(archive.read("adapter_config.json"))
    assert (config["peft_type"], config["r"], config["target_modules"]) == ("LORA", 4, ["a", "b"])
    assert config["base_model_name_or_path"] == "tiny"
    tensors = load(archive.read("adapter_model.safetensors"))
    for index, name in enumerate(("a", "b")):
        prefix = f"base_model.model.{name}"
        delta = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        torch.testing.assert_close(delta, basis.B[index] @ R[index] @ basis.A[index], atol=1e-5, rtol=1e-5)


class Replacing(AdapterStore):
    """Deletes and forgets the adapter, and publishes it again with other weights, before it is fetched."""

    async def fetch(self, refs: Sequence[AdapterRef]) -> list[bytes | None]:
        basis = small_basis()
        await self.delete("default", "anna")
        await self._redis.delete(keys.adapter_tombstone("default", "anna"))
        adapter = Adapter(basis.basis_id, torch.ones(2, 4, 4))
        assert (await self.publish("default", "anna", adapter, dtype=torch.float32)).version == refs[
            0
        ].version
        return await super().fetch(refs)


async def test_the_zip_is_of_the_version_that_was_resolved_or_none(
    redis: Redis, adapters: AdapterStore
) -> None:
    basis = small_basis()
    await BasisStore(redis).put(basis)
    await publish(adapters, "anna", basis_id=basis.basis_id)
    with pytest.raises(AdapterReplaced):
        await peft_zip(
            Replacing(redis), BasisStore(redis), tenant="default", adapter_id="anna", version=None,
            base_model="tiny",
        )  # fmt: skip


async def test_what_is_not_there_is_404(client: httpx.AsyncClient, adapters: AdapterStore) -> None:
    assert (await client.get("/v1/adapters/nobody/peft")).status_code == 404
    await publish(adapters, "anna")  # its basis was never stored
    assert (await client.get("/v1/adapters/anna/peft?version=7")).status_code == 404
    assert (await client.get("/v1/adapters/anna/peft")).json()["error"]["code"] == "basis_not_found"
