"""/v1/models, /v1/adapters and /v1/bases."""

from __future__ import annotations

import httpx
import pytest
from redis.asyncio import Redis

from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tests.fakes import FakeEngine
from tests.service.conftest import publish, small_basis
from tests.service.training import BASIS_ID


async def test_models_are_the_base_and_the_callers_adapters(
    client: httpx.AsyncClient, engine: FakeEngine, adapters: AdapterStore
) -> None:
    engine.is_ready = False  # the list does not need it
    for name in ("anna", "bert"):
        await publish(adapters, name)

    page = (await client.get("/v1/models")).json()

    assert page["data"][0]["id"] == "tiny"
    assert page["data"][0]["parent"] is None
    assert {model["id"] for model in page["data"][1:]} == {"anna", "bert"}
    assert all(model["object"] == "model" and model["root"] == "tiny" for model in page["data"])


@pytest.mark.parametrize("name", ["anna", "anna@1", "tiny:anna"])
async def test_one_model(client: httpx.AsyncClient, adapters: AdapterStore, name: str) -> None:
    await publish(adapters, "anna")

    model = (await client.get(f"/v1/models/{name}")).json()

    assert (model["id"], model["parent"], model["adapter_version"]) == ("anna", "tiny", 1)
    assert (await client.get("/v1/models/tiny")).json()["id"] == "tiny"


@pytest.mark.parametrize("name", ["nobody", "anna@2", "a/b", "%2e%2e/x"])
async def test_an_unknown_model_is_404(client: httpx.AsyncClient, adapters: AdapterStore, name: str) -> None:
    await publish(adapters, "anna")

    for method in ("GET", "DELETE"):
        reply = await client.request(method, f"/v1/models/{name}")
        if method == "DELETE" and "@" in name:
            assert reply.status_code == 400  # a version cannot be deleted, known or not
            continue
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize("url", ["/v1/models/anna", "/v1/adapters/anna"])
async def test_a_deleted_adapter_is_gone_from_store_and_engine(
    client: httpx.AsyncClient, engine: FakeEngine, adapters: AdapterStore, url: str
) -> None:
    await publish(adapters, "anna")

    deleted = (await client.delete(url)).json()

    assert (deleted["id"], deleted["deleted"]) == ("anna", True)
    assert engine.unloaded == [("default", "anna")]
    assert (await client.delete(url)).status_code == 404
    reply = await client.post("/v1/completions", json={"model": "anna", "prompt": "a"})
    assert reply.status_code == 404


async def test_the_base_model_cannot_be_deleted(client: httpx.AsyncClient) -> None:
    reply = await client.delete("/v1/models/tiny")

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")


async def test_an_adapter_has_versions(client: httpx.AsyncClient, adapters: AdapterStore) -> None:
    for _ in range(2):
        await publish(adapters, "anna")

    adapter = (await client.get("/v1/adapters/anna")).json()

    assert (adapter["object"], adapter["active_version"], adapter["latest_version"]) == ("adapter", 2, 2)
    assert [version["version"] for version in adapter["versions"]] == [1, 2]
    version = adapter["versions"][0]
    assert (version["basis"], version["rank"], version["dtype"]) == (BASIS_ID, 4, "float16")
    assert version["bytes"] > 2 * 4 * 4 * 2


async def test_a_rollback_is_a_change_of_the_active_version(
    client: httpx.AsyncClient, engine: FakeEngine, adapters: AdapterStore
) -> None:
    for _ in range(2):
        await publish(adapters, "anna")

    reply = await client.patch("/v1/adapters/anna", json={"active_version": 1})

    assert (reply.status_code, reply.json()["active_version"]) == (200, 1)
    answer = await client.post("/v1/completions", json={"model": "anna", "prompt": "a"})
    assert answer.json()["adapter"] == {"id": "anna", "version": 1}


@pytest.mark.parametrize(
    ("body", "status"),
    [({"active_version": 9}, 404), ({"active_version": 0}, 400), ({"version": 1}, 400), ({}, 400)],
)
async def test_a_rollback_needs_an_existing_version(
    client: httpx.AsyncClient, adapters: AdapterStore, body: dict[str, int], status: int
) -> None:
    await publish(adapters, "anna")

    assert (await client.patch("/v1/adapters/anna", json=body)).status_code == status


async def test_adapters_are_listed_in_pages(client: httpx.AsyncClient, adapters: AdapterStore) -> None:
    names = {f"user-{n}" for n in range(7)}
    for name in names:
        await publish(adapters, name)

    seen: list[str] = []
    has_more = True
    while has_more:
        params = {"limit": 3} | ({"after": seen[-1]} if seen else {})
        page = (await client.get("/v1/adapters", params=params)).json()
        seen += [adapter["id"] for adapter in page["data"]]
        has_more = page["has_more"]

    assert set(seen) == names
    assert len(seen) == 7


async def test_bases_are_listed_without_their_modules(client: httpx.AsyncClient, redis: Redis) -> None:
    basis = small_basis()
    await BasisStore(redis).put(basis)

    (listed,) = (await client.get("/v1/bases")).json()["data"]
    detail = (await client.get(f"/v1/bases/{basis.basis_id}")).json()

    assert (listed["id"], listed["rank"], listed["num_modules"]) == (basis.basis_id, 4, 2)
    assert listed["bytes"] == 2 * 4 * (8 + 6) * 4
    assert listed["is_default"] is False
    assert "modules" not in listed
    assert detail["modules"][0] == {"name": "a", "d_in": 8, "d_out": 6}
    assert {name: detail[name] for name in listed} == listed


@pytest.mark.parametrize("basis_id", ["f" * 64, "nonsense", "}:x"])
async def test_an_unknown_basis_is_404(client: httpx.AsyncClient, basis_id: str) -> None:
    reply = await client.get(f"/v1/bases/{basis_id}")

    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "basis_not_found")
