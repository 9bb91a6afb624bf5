"""API keys, and that no tenant sees anything of another."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from service.errors import Unauthenticated
from service.http.auth import DEFAULT_TENANT, ApiKeys
from service.settings import ServiceSettings, refuse_open_door
from tessera.errors import InvalidInput
from tessera.store.adapters import AdapterStore
from tests.fakes import FakeEngine
from tests.service.conftest import MakeApp, client_of, publish
from tests.service.training import upload

KEYS = {"acme": "sk-acme", "umbrella": "sk-umbrella"}


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# who  what\n\n" + "".join(f"{t} {digest(k)}  # ok\n" for t, k in KEYS.items()))
    return path


@pytest_asyncio.fixture
async def locked(make_app: MakeApp, keys_file: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that requires keys; the client sends none by itself."""
    async with client_of(make_app(api_keys_file=keys_file)) as client:
        yield client


def as_tenant(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[tenant]}"}


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Bearer ", "missing_api_key"),
        ("Basic sk-acme", "missing_api_key"),
        ("Bearer sk-nobody", "invalid_api_key"),
        ("Bearer " + digest("sk-acme"), "invalid_api_key"),
    ],
)
async def test_a_request_without_a_known_key_learns_nothing(
    locked: httpx.AsyncClient, authorization: str | None, code: str
) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    for method, url in (("GET", "/v1/models"), ("POST", "/v1/files"), ("GET", "/v1/nothing")):
        reply = await locked.request(method, url, headers=headers)

        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == code
        assert reply.json()["error"]["type"] == "authentication_error"
        assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("url", ["/health/live", "/health/ready", "/metrics", "/version", "/openapi.json"])
async def test_machines_that_watch_need_no_key(locked: httpx.AsyncClient, url: str) -> None:
    assert (await locked.get(url)).status_code == 200


async def test_the_tenant_comes_from_the_key(locked: httpx.AsyncClient, engine: FakeEngine) -> None:
    for tenant in KEYS:
        body = {"model": "tiny", "prompt": "a", "user": "someone"}
        reply = await locked.post("/v1/completions", json=body, headers=as_tenant(tenant))
        assert reply.status_code == 200

    assert [request.tenant for request in engine.requests] == list(KEYS)


async def test_another_tenants_adapter_looks_like_none(
    locked: httpx.AsyncClient, engine: FakeEngine, adapters: AdapterStore
) -> None:
    await publish(adapters, "secret", tenant="acme")
    requests = [
        ("POST", "/v1/completions", {"model": "{}", "prompt": "a"}),
        ("POST", "/v1/completions", {"model": "{}@1", "prompt": "a", "stream": True}),
        ("POST", "/v1/chat/completions", {"model": "{}", "messages": [{"role": "user", "content": "a"}]}),
        ("POST", "/v1/score", {"model": "{}", "input": [{"text": "a b"}]}),
        ("GET", "/v1/models/{}", None),
        ("DELETE", "/v1/models/{}", None),
        ("GET", "/v1/adapters/{}", None),
        ("PATCH", "/v1/adapters/{}", {"active_version": 1}),
        ("DELETE", "/v1/adapters/{}", None),
    ]

    for method, url, body in requests:
        answers = []
        for name in ("secret", "absent"):
            sent = body and {k: v.format(name) if k == "model" else v for k, v in body.items()}
            reply = await locked.request(method, url.format(name), json=sent, headers=as_tenant("umbrella"))
            answers.append((reply.status_code, reply.text.replace(name, "{}")))
        assert answers[0] == answers[1]
        assert answers[0][0] == 404
    assert engine.requests == []
    assert (await locked.get("/v1/adapters/secret", headers=as_tenant("acme"))).status_code == 200
    assert (await locked.get("/v1/adapters", headers=as_tenant("umbrella"))).json()["data"] == []
    assert len((await locked.get("/v1/models", headers=as_tenant("umbrella"))).json()["data"]) == 1


async def test_another_tenants_files_and_jobs_look_like_none(locked: httpx.AsyncClient) -> None:
    locked.headers.update(as_tenant("acme"))
    file_id = (await upload(locked)).json()["id"]
    body = {"model": "tiny", "training_file": file_id}
    job_id = (await locked.post("/v1/fine_tuning/jobs", json=body)).json()["id"]

    locked.headers.update(as_tenant("umbrella"))

    assert (await locked.post("/v1/fine_tuning/jobs", json=body)).status_code == 404
    for method, url in (
        ("GET", f"/v1/files/{file_id}"),
        ("GET", f"/v1/files/{file_id}/content"),
        ("DELETE", f"/v1/files/{file_id}"),
        ("GET", f"/v1/fine_tuning/jobs/{job_id}"),
        ("GET", f"/v1/fine_tuning/jobs/{job_id}/events"),
        ("GET", f"/v1/fine_tuning/jobs/{job_id}/events?stream=true"),
        ("GET", f"/v1/fine_tuning/jobs/{job_id}/checkpoints"),
        ("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel"),
        ("POST", f"/v1/fine_tuning/jobs/{job_id}/pause"),
        ("POST", f"/v1/fine_tuning/jobs/{job_id}/resume"),
    ):
        assert (await locked.request(method, url)).status_code == 404, url
    assert (await locked.get("/v1/files")).json()["data"] == []
    assert (await locked.get("/v1/fine_tuning/jobs")).json()["data"] == []
    locked.headers.update(as_tenant("acme"))
    assert (await locked.get(f"/v1/fine_tuning/jobs/{job_id}")).json()["status"] == "queued"


async def test_idempotency_keys_are_each_tenants_own(locked: httpx.AsyncClient) -> None:
    ids = set()
    for tenant in KEYS:
        locked.headers.update({**as_tenant(tenant), "idempotency-key": "same"})
        file_id = (await upload(locked)).json()["id"]
        body = {"model": "tiny", "training_file": file_id}
        ids.add((await locked.post("/v1/fine_tuning/jobs", json=body)).json()["id"])

    assert len(ids) == 2


def test_without_a_key_file_everybody_is_the_default_tenant() -> None:
    assert ApiKeys.load(None).tenant_of(None) == DEFAULT_TENANT
    assert ApiKeys.load(None).tenant_of("Bearer anything") == DEFAULT_TENANT


def test_a_key_file_may_be_json_with_several_keys_of_a_tenant(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(f'{{"acme": ["{digest("one")}", "{digest("two")}"]}}')

    keys = ApiKeys.load(path)

    assert keys.tenant_of("Bearer one") == keys.tenant_of("bearer two") == "acme"
    with pytest.raises(Unauthenticated):
        keys.tenant_of("Bearer three")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "acme sk-plain-key\n",
        "acme\n",
        f"Acme! {digest('x')}\n",
        f"acme {digest('x')}\nother {digest('x')}\n",
        f"acme {digest('x')} more\n",
        "{not json",
        '{"acme": "one"}',
        '{"acme": ["plain"]}',
    ],
)
def test_a_key_file_that_is_not_understood_opens_no_door(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)

    with pytest.raises(InvalidInput):
        ApiKeys.load(path)


def test_a_key_file_that_is_missing_opens_no_door(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read"):
        ApiKeys.load(tmp_path / "absent")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "tessera.example"])
def test_other_machines_are_served_only_with_keys_or_on_purpose(host: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="API keys"):
        refuse_open_door(ServiceSettings(host=host))
    refuse_open_door(ServiceSettings(host=host, allow_anonymous=True))
    refuse_open_door(ServiceSettings(host=host, api_keys_file=tmp_path / "keys"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_is_served_without_keys(host: str) -> None:
    refuse_open_door(ServiceSettings(host=host))
