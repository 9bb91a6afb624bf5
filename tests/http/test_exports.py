"""/v1/adapters/{id}/peft: a zip whose LoRA has the adapter's delta."""

from __future__ import annotations

import io
import json
import zipfile

import httpx
import torch
from redis.asyncio import Redis
from safetensors.torch import load

from adapter_core.adapter import Adapter
from adapter_core.basis_store import BasisStore
from adapter_core.store import AdapterStore
from tests.http.conftest import publish, small_basis


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


async def test_what_is_not_there_is_404(client: httpx.AsyncClient, adapters: AdapterStore) -> None:
    assert (await client.get("/v1/adapters/nobody/peft")).status_code == 404
    await publish(adapters, "anna")  # its basis was never stored
    assert (await client.get("/v1/adapters/anna/peft?version=7")).status_code == 404
    assert (await client.get("/v1/adapters/anna/peft")).json()["error"]["code"] == "basis_not_found"
