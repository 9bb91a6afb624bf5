"""`lora_path` and `adapter_id`: the fields in which SGLang's and LoRAX's clients name an adapter."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tessera.formats.adapter_ref import AdapterRef
from tessera.store.adapters import AdapterStore
from tests.fakes import FakeEngine
from tests.service.answers import CHAT, JOBS, SCORE, SOUND, TEXT, check_error
from tests.service.conftest import publish


def used(engine: FakeEngine) -> AdapterRef | None:
    return engine.requests[-1].adapter


@pytest.mark.parametrize("url", [TEXT, CHAT, SCORE])
@pytest.mark.parametrize("field", ["lora_path", "adapter_id"])
async def test_an_alias_names_the_adapter(
    client: httpx.AsyncClient, engine: FakeEngine, adapters: AdapterStore, url: str, field: str
) -> None:
    for _ in range(2):
        await publish(adapters, "anna")

    for name, version in (("anna", 2), ("anna@1", 1), ("tiny:anna@2", 2)):
        for model in ("tiny", name):
            reply = await client.post(url, json={**SOUND[url], "model": model, field: name})

            assert reply.status_code == 200, reply.text
            assert reply.json()["adapter"] == {"id": "anna", "version": version}
            assert reply.json()["model"] == name
            adapter = used(engine)
            assert adapter is not None
            assert (adapter.adapter_id, adapter.version) == ("anna", version)


async def test_the_base_model_may_be_named_twice(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for alias in (None, "tiny"):
        reply = await client.post(TEXT, json={**SOUND[TEXT], "lora_path": alias, "adapter_id": alias})

        assert reply.json()["adapter"] is None
        assert used(engine) is None


@pytest.mark.parametrize(
    ("names", "param"),
    [
        ({"model": "anna", "lora_path": "bob"}, "lora_path"),
        ({"model": "anna", "adapter_id": "anna@1"}, "adapter_id"),
        ({"model": "anna", "adapter_id": "tiny"}, "adapter_id"),
        ({"lora_path": "anna", "adapter_id": "bob"}, "adapter_id"),
        ({"model": "default", "lora_path": "anna"}, "lora_path"),
        ({"lora_path": ["anna"]}, "lora_path"),
        ({"lora_path": 3}, "lora_path"),
        ({"adapter_id": "a" * 257}, "adapter_id"),
    ],
)
async def test_names_that_contradict_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, adapters: AdapterStore, names: Any, param: str
) -> None:
    for name in ("anna", "bob"):
        await publish(adapters, name)

    error = check_error(await client.post(TEXT, json={**SOUND[TEXT], **names}), 400)

    assert (error["code"], error["param"]) == ("invalid_value", param)
    assert engine.requests == []


@pytest.mark.parametrize("alias", ["nobody", "nobody@2", "../x", ""])
async def test_an_unknown_alias_is_404(client: httpx.AsyncClient, engine: FakeEngine, alias: str) -> None:
    error = check_error(await client.post(CHAT, json={**SOUND[CHAT], "lora_path": alias}), 404)

    assert (error["code"], error["param"]) == ("model_not_found", "lora_path")
    assert engine.requests == []


async def test_a_job_has_no_aliases(client: httpx.AsyncClient, file_id: str) -> None:
    body = {**SOUND[JOBS], "training_file": file_id, "adapter_id": "anna"}

    error = check_error(await client.post(JOBS, json=body), 400)

    assert (error["code"], error["param"]) == ("unsupported_parameter", "adapter_id")
    assert "use adapter.id" in error["message"]
