"""/v1/bases, and the basis and init of a fine-tuning job, which are checked before the job is queued."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from service.http.auth import DEFAULT_TENANT
from tessera.defaults import LLAMA_LINEARS
from tessera.formats.basis import Basis
from tessera.formats.manifest import ModuleShape
from tessera.queue.client import JobQueue, JobSpec
from tessera.queue.leases import JobLeases
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tessera.store.holds import BasisHolds
from tessera.store.ownership import PrivateBases
from tests.service.conftest import MakeApp, client_of, publish, small_basis
from tests.service.http.test_auth import as_tenant, keys_file  # noqa: F401 - a fixture
from tests.service.sse import DONE, parse
from tests.service.training import JOBS, create

BASES = "/v1/bases"
BASIS_JOBS = "/v1/bases/jobs"
NO_FILE = "file-" + "0" * 24


class Owned:
    """Private bases of tenants, stored as a worker stores them."""

    def __init__(self, redis: Redis) -> None:
        self.bases = BasisStore(redis)
        self.own = PrivateBases(redis, max_bytes=2**40)
        self.holds = BasisHolds(redis, self.own)

    async def put(self, tenant: str = DEFAULT_TENANT, *, job_id: str = "") -> Basis:
        basis = small_basis()
        ownership = await self.own.reserve(tenant, basis.manifest)
        assert ownership is not None
        await self.bases.put_private(basis, ownership)
        if job_id:
            await self.holds.hold(tenant, basis.basis_id, job_id)
        return basis

    async def fill(self) -> None:
        """Use all of the quota that the default settings give a tenant."""
        wide = replace(small_basis().manifest, basis_id="c" * 64, modules=(ModuleShape("a", 2**26, 8),))
        assert await self.own.reserve(DEFAULT_TENANT, wide)


@pytest.fixture
def owned(redis: Redis) -> Owned:
    return Owned(redis)


@pytest_asyncio.fixture
async def locked(make_app: MakeApp, keys_file: Path) -> AsyncIterator[httpx.AsyncClient]:  # noqa: F811
    async with client_of(make_app(api_keys_file=keys_file)) as client:
        yield client


async def build(client: httpx.AsyncClient, headers: Any = None, **body: Any) -> dict[str, Any]:
    reply = await client.post(BASES, json={"method": "lora_xs", **body}, headers=headers)
    assert reply.status_code == 202, reply.text
    return dict(reply.json())


async def spec_of(redis: Redis, job: dict[str, Any]) -> JobSpec:
    kind = "basis" if job["object"] == "basis.job" else "adapter"
    return (await JobQueue(redis, kind=kind).get(DEFAULT_TENANT, job["id"])).spec


# Jobs that build a basis


async def test_a_basis_is_built_by_a_job(client: httpx.AsyncClient, redis: Redis, file_id: str) -> None:
    options = {"share": 0.5, "seed": 0}

    job = await build(
        client, method="lora_sb", rank=4, options=options, calibration_file=file_id,
        target_modules=["v_proj", "q_proj"], metadata={"a": "b"},
    )  # fmt: skip

    assert job["id"].startswith("basisjob-")
    assert (job["object"], job["status"], job["basis"], job["error"]) == ("basis.job", "queued", None, None)
    assert (job["method"], job["rank"], job["calibration_file"]) == ("lora_sb", 4, file_id)
    assert (job["options"], job["target_modules"]) == ({"share": 0.5}, ["q_proj", "v_proj"])
    assert (job["metadata"], job["queue_position"], job["attempt"]) == ({"a": "b"}, 1, 0)
    assert (await client.get(f"{BASIS_JOBS}/{job['id']}")).json() == job
    spec = await spec_of(redis, job)
    assert (spec.kind, spec.calibration, spec.base_model) == ("basis", file_id, "tiny")


async def test_the_usual_target_modules_are_no_choice(client: httpx.AsyncClient, redis: Redis) -> None:
    """Otherwise the basis would be private, although the same one is shared."""
    job = await build(client, target_modules=sorted(LLAMA_LINEARS), options={"seed": 0})

    spec = await spec_of(redis, job)
    assert (spec.target_modules, spec.basis_options) == (None, {})


async def test_a_preset_gives_its_basis_half(client: httpx.AsyncClient, redis: Redis, file_id: str) -> None:
    job = await build(client, method="lora_da_repo", options={"scale": 2.0}, calibration_file=file_id)

    spec = await spec_of(redis, job)
    assert (spec.method, spec.basis_options) == ("lora_da", {"mode": "repo", "scale": 2.0})
    assert spec.rank == 16


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"method": "magic"}, 400, "invalid_value", "method"),
        ({"method": "lora_xs", "options": {"vectors": "side"}}, 400, "invalid_value", "options.vectors"),
        ({"method": "lora_xs", "options": {"magic": 1}}, 400, "invalid_value", "options.magic"),
        ({"method": "lora_xs", "options": {"seed": [1]}}, 400, "invalid_value", "options.seed"),
        ({"method": "lora_xs", "options": {"seed": 1e300}}, 400, "invalid_value", "options.seed"),
        ({"method": "lora_xs", "options": {"rank": 3}}, 400, "invalid_value", "options.rank"),
        ({"method": "lora_xs", "rank": 129}, 400, "invalid_value", "rank"),
        ({"method": "lora_xs", "rank": 0}, 400, "invalid_value", "rank"),
        ({"method": "loram", "rank": 1}, 400, "invalid_value", "rank"),
        (
            {"method": "loram", "options": {"magnitude": "tracking", "reference": "corda"}},
            400,
            "missing_required_parameter",
            "calibration_file",
        ),
        ({"method": "loram", "options": {"tracking": "factor"}}, 400, "invalid_value", "options.tracking"),
        ({"method": "loram", "calibration_file": NO_FILE}, 400, "invalid_value", "calibration_file"),
        ({"method": "lora_sb", "options": {"noise": -1.0}}, 400, "invalid_value", "options.noise"),
        (
            {"method": "lora_da", "options": {"output_factor": "block", "form": "two_sided"}},
            400,
            "invalid_value",
            "options.output_factor",
        ),
        ({"method": "lora_xs", "target_modules": ["nothing"]}, 400, "unsupported_model", "target_modules"),
        (
            {"method": "lora_xs", "target_modules": ["q_proj", "v_porj"]},
            400,
            "unsupported_model",
            "target_modules",
        ),
        ({"method": "lora_xs", "target_modules": []}, 400, "invalid_value", "target_modules"),
        ({"method": "lora_sb"}, 400, "missing_required_parameter", "calibration_file"),
        ({"method": "lora_sb", "calibration_file": NO_FILE}, 404, "file_not_found", "calibration_file"),
        ({"method": "lora_sb", "calibration_file": "own"}, 404, "file_not_found", "calibration_file"),
        ({"method": "lora_xs", "calibration_file": NO_FILE}, 400, "invalid_value", "calibration_file"),
        ({"method": "lora_xs", "colour": "red"}, 400, "unknown_parameter", "colour"),
        ({}, 400, "missing_required_parameter", "method"),
    ],
)
async def test_what_cannot_be_built_is_refused_by_name(
    client: httpx.AsyncClient, redis: Redis, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    reply = await client.post(BASES, json=body)

    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
    assert (await client.get(BASIS_JOBS)).json()["data"] == []


async def test_both_kinds_of_jobs_are_unknown_to_each_other(client: httpx.AsyncClient, file_id: str) -> None:
    basis_job, job = await build(client), await create(client, file_id)

    for url, found in ((JOBS, job), (BASIS_JOBS, basis_job)):
        assert [item["id"] for item in (await client.get(url)).json()["data"]] == [found["id"]]
    for url, other in ((JOBS, basis_job), (BASIS_JOBS, job)):
        replies = [
            await client.get(f"{url}/{other['id']}"),
            await client.get(f"{url}/{other['id']}/events"),
            await client.post(f"{url}/{other['id']}/cancel"),
        ]
        assert [reply.status_code for reply in replies] == [404, 404, 404]
        assert replies[2].json()["error"]["code"] == "job_not_found"
        after = await client.get(url, params={"after": other["id"]})
        assert after.json()["data"] == []
    assert (await client.post(f"{BASIS_JOBS}/{basis_job['id']}/cancel")).json()["status"] == "cancelled"
    assert (await client.get(f"{JOBS}/{job['id']}")).json()["status"] == "queued"


async def test_a_basis_job_is_created_once(client: httpx.AsyncClient, file_id: str) -> None:
    headers = {"idempotency-key": "once"}

    first = await build(client, headers)

    assert (await build(client, headers))["id"] == first["id"]
    assert (await build(client))["id"] != first["id"]
    assert (await create(client, file_id, headers))["object"] == "fine_tuning.job"  # keys of its own
    reply = await client.post(BASES, json={"method": "random"}, headers=headers)
    assert reply.json()["error"]["code"] == "idempotency_key_reused"


async def test_a_basis_job_is_followed_to_its_basis(client: httpx.AsyncClient, redis: Redis) -> None:
    job = await build(client)
    leases = JobLeases(redis)
    (lease,) = await leases.claim("worker", limit=1, lease_s=60)
    await leases.report(lease, message="Basis built", progress={"modules_done": 28, "modules": 28})
    await leases.complete(lease, {"basis_id": "d" * 64})

    done = (await client.get(f"{BASIS_JOBS}/{job['id']}")).json()
    page = (await client.get(f"{BASIS_JOBS}/{job['id']}/events")).json()["data"]
    streamed = parse((await client.get(f"{BASIS_JOBS}/{job['id']}/events?stream=true")).text)

    assert (done["status"], done["basis"]) == ("succeeded", "d" * 64)
    assert done["progress"] == {"modules_done": 28, "modules": 28}
    assert [event["message"] for event in page][::-1] == [
        "Job queued", "Building started (attempt 1)", "Basis built", "Job succeeded",
    ]  # fmt: skip
    assert streamed == [*page[::-1], DONE]


async def test_everything_has_a_description(client: httpx.AsyncClient) -> None:
    listed = (await client.get(f"{BASES}/methods")).json()

    assert listed["methods"]["lora_sb"]["needs_calibration"] == "labelled"
    assert listed["methods"]["lora_xs"]["options"]["vectors"]["choices"]
    assert listed["starts"]["sb_step"]["options"]["eta_init"]["default"] == "line_search"
    assert listed["starts"]["warm"]["needs_adapter"] is True
    assert listed["presets"]["lora_sb"] | {"paper": ""} == {
        "basis": "lora_sb", "start": "sb_step", "paper": "", "basis_options": {},
        "start_options": {"eta_init": "lr"}, "own_basis": True, "caller_sets": ["learning_rate"],
    }  # fmt: skip
    assert all(item["paper"] for item in listed["methods"].values())


# Basis and init of a fine-tuning job


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({}, ("lora_xs", {}, None, None)),
        ({"method": "pissa"}, ("pissa", {}, None, None)),
        ({"basis": "lora_sb"}, ("lora_sb", {}, "own", ("sb_step", {}))),
        ({"basis": "lora_sb", "init": "zero"}, ("lora_sb", {}, "own", ("zero", {}))),
        ({"basis": "lora_sb", "init": "lora_sb"}, ("lora_sb", {}, "own", ("sb_step", {"eta_init": "lr"}))),
        ({"basis": "lora_xs"}, ("lora_xs", {}, None, ("noise", {"sigma": 1e-5}))),
        ({"basis": "eva"}, ("eva", {}, "own", ("zero", {}))),
        (
            {"basis": {"method": "lora_xs", "options": {"vectors": "bottom", "seed": 0}}},
            ("lora_xs", {"vectors": "bottom"}, None, None),
        ),
        (
            {"basis": {"method": "lora_da", "calibration": "own"}, "init": {"method": "da_step"}},
            ("lora_da", {}, "own", ("da_step", {})),
        ),
        (
            {"basis": "lora_da_block"},
            (
                "lora_da",
                {"output_factor": "block"},
                "own",
                ("da_step", {"output_factor": "block"}),
            ),
        ),
        (
            {"basis": {"method": "lora_sb", "options": {"noise": 3.0}, "calibration": "own"}, "init": "zero"},
            ("lora_sb", {"noise": 3.0}, "own", ("zero", {})),
        ),
        (
            {
                "basis": {
                    "method": "loram",
                    "options": {"magnitude": "tracking", "reference": "corda"},
                    "calibration": "own",
                }
            },
            ("loram", {"magnitude": "tracking", "reference": "corda"}, "own", None),
        ),
        (
            {"init": {"method": "lora_one", "options": {"eta": 0.5}}},
            ("lora_xs", {}, None, ("gradient", {"eta_init": "value", "eta": 0.5, "normalise": "spectral"})),
        ),
    ],
)
async def test_basis_and_start_are_two_choices(
    client: httpx.AsyncClient, redis: Redis, file_id: str, adapter: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    job = await create(client, file_id, adapter=adapter)

    spec = await spec_of(redis, job)
    method, options, calibration, start = expected
    assert (spec.method, spec.basis_options, spec.calibration) == (method, options, calibration)
    assert spec.start == (None if start is None else {"method": start[0], "options": start[1]})
    assert job["adapter"]["init"] == ("zero" if start is None else start[0])
    assert job["adapter"]["calibration"] == calibration


async def test_calibration_data_may_be_another_file(
    client: httpx.AsyncClient, redis: Redis, file_id: str
) -> None:
    basis = {"method": "lora_sb", "calibration": file_id}

    job = await create(client, file_id, adapter={"basis": basis})

    assert (await spec_of(redis, job)).calibration == file_id
    assert job["adapter"]["calibration"] == file_id


@pytest.mark.parametrize(
    ("adapter", "status", "code", "param"),
    [
        ({"basis": "magic"}, 400, "invalid_value", "adapter.basis"),
        ({"basis": ""}, 400, "invalid_value", "adapter.basis"),
        ({"basis": {"method": "magic"}}, 400, "invalid_value", "adapter.basis.method"),
        ({"basis": {"method": "lora_sb"}}, 400, "missing_required_parameter", "adapter.basis.calibration"),
        (
            {"basis": {"method": "lora_xs", "calibration": "own"}},
            400,
            "invalid_value",
            "adapter.basis.calibration",
        ),
        (
            {"basis": {"method": "lora_sb", "calibration": NO_FILE}},
            404,
            "file_not_found",
            "adapter.basis.calibration",
        ),
        (
            {"basis": {"method": "lora_xs", "options": {"scale": 0}}},
            400,
            "invalid_value",
            "adapter.basis.options.scale",
        ),
        ({"basis": {"method": "lora_xs", "colour": 1}}, 400, "unknown_parameter", "adapter.basis.colour"),
        ({"basis": "lora_xs", "method": "pissa"}, 400, "invalid_value", "adapter.method"),
        ({"basis": "lora_xs", "rank": 300}, 400, "invalid_value", "adapter.rank"),
        ({"rank": 300}, 400, "invalid_value", "adapter.rank"),
        ({"method": "lora_sb"}, 400, "invalid_value", "adapter.method"),
        ({"init": "magic"}, 400, "invalid_value", "adapter.init"),
        ({"init": "warm"}, 400, "invalid_value", "adapter.init"),
        (
            {"init": {"method": "zero", "options": {"eta": 1}}},
            400,
            "invalid_value",
            "adapter.init.options.eta",
        ),
        (
            {"init": {"method": "sb_step", "options": {"eta_init": "value"}}},
            400,
            "invalid_value",
            "adapter.init.options.eta",
        ),
        (
            {"init": {"method": "noise", "options": {"sigma": -1.0}}},
            400,
            "invalid_value",
            "adapter.init.options.sigma",
        ),
    ],
)
async def test_a_wrong_basis_or_start_is_refused_by_name(
    client: httpx.AsyncClient, file_id: str, adapter: dict[str, Any], status: int, code: str, param: str
) -> None:
    reply = await client.post(JOBS, json={"model": "tiny", "training_file": file_id, "adapter": adapter})

    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
    assert (await client.get(JOBS)).json()["data"] == []


async def test_an_adapter_is_moved_to_another_basis_only_on_request(
    client: httpx.AsyncClient, redis: Redis, file_id: str, adapters: AdapterStore
) -> None:
    basis = small_basis()
    await BasisStore(redis).put(basis)
    await publish(adapters, "anna", basis_id=basis.basis_id)
    sent = {"model": "anna", "training_file": file_id}

    refused = await client.post(JOBS, json={**sent, "adapter": {"basis": "random"}})
    thrown = await client.post(JOBS, json={**sent, "adapter": {"init": "zero"}})
    job = await create(client, file_id, model="anna", adapter={"basis": "random", "init": "warm"})

    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "adapter.basis")
    assert (thrown.status_code, thrown.json()["error"]["param"]) == (400, "adapter.init")
    spec = await spec_of(redis, job)
    assert (spec.warm_start_from, spec.method, spec.basis_id) == ("anna@1", "random", None)
    assert spec.start == {"method": "warm", "options": {}}


# Private bases


async def test_an_own_basis_is_listed_used_and_deleted(
    client: httpx.AsyncClient, owned: Owned, file_id: str
) -> None:
    everybodys = replace(small_basis().manifest, basis_id="e" * 64)
    assert everybodys.basis_id != small_basis().basis_id
    basis = await owned.put()

    page = (await client.get(BASES)).json()["data"]
    one = (await client.get(f"{BASES}/{basis.basis_id}")).json()
    job = await create(client, file_id, adapter={"basis": basis.basis_id})
    gone = await client.delete(f"{BASES}/{basis.basis_id}")

    assert [(item["id"], item["is_own"]) for item in page] == [(basis.basis_id, True)]
    assert (one["is_own"], len(one["modules"])) == (True, 2)
    assert job["adapter"]["basis"] == basis.basis_id
    assert gone.json() == {"id": basis.basis_id, "object": "basis", "deleted": True}
    for reply in (
        await client.get(f"{BASES}/{basis.basis_id}"),
        await client.delete(f"{BASES}/{basis.basis_id}"),
    ):
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "basis_not_found")


async def test_a_basis_in_use_cannot_be_deleted(
    client: httpx.AsyncClient, owned: Owned, redis: Redis, file_id: str, adapters: AdapterStore
) -> None:
    job = await create(client, file_id)
    basis = await owned.put(job_id=job["id"])
    await owned.own.use(DEFAULT_TENANT, basis.basis_id, "anna", deletion_count=0)
    await publish(adapters, "anna", basis_id=basis.basis_id)

    used = await client.delete(f"{BASES}/{basis.basis_id}")
    await client.delete("/v1/adapters/anna")
    held = await client.delete(f"{BASES}/{basis.basis_id}")
    await client.post(f"{JOBS}/{job['id']}/cancel")  # it ends without letting go
    freed = await client.delete(f"{BASES}/{basis.basis_id}")

    for reply, name in ((used, "anna"), (held, job["id"])):
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (409, "basis_in_use", "basis_id")
        assert name in error["message"]
    assert freed.status_code in (200, 404)  # the hold was the last that kept it
    assert await owned.own.of_tenant(DEFAULT_TENANT) == {}


async def test_a_basis_of_everybody_cannot_be_deleted(client: httpx.AsyncClient, redis: Redis) -> None:
    basis_id = await BasisStore(redis).put(small_basis())

    reply = await client.delete(f"{BASES}/{basis_id}")

    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "basis_not_found")
    assert (await client.get(f"{BASES}/{basis_id}")).json()["is_own"] is False


async def test_another_tenants_basis_looks_like_none(locked: httpx.AsyncClient, owned: Owned) -> None:
    basis = await owned.put("acme")
    file = await locked.post(
        "/v1/files",
        files={"file": ("d.jsonl", b'{"text": "a b"}\n')},
        data={"purpose": "fine-tune"},
        headers=as_tenant("umbrella"),
    )
    sent = {"model": "tiny", "training_file": file.json()["id"], "adapter": {"basis": basis.basis_id}}
    theirs = as_tenant("umbrella")

    replies = [
        await locked.get(f"{BASES}/{basis.basis_id}", headers=theirs),
        await locked.delete(f"{BASES}/{basis.basis_id}", headers=theirs),
        await locked.post(JOBS, json=sent, headers=theirs),
    ]

    for reply in replies:
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "basis_not_found")
    assert (await locked.get(BASES, headers=theirs)).json()["data"] == []
    assert (await locked.get(f"{BASES}/{basis.basis_id}", headers=as_tenant("acme"))).status_code == 200


async def test_a_tenant_without_quota_is_refused_before_anything_is_queued(
    client: httpx.AsyncClient, owned: Owned, file_id: str
) -> None:
    await owned.fill()

    own_job = await client.post(
        JOBS, json={"model": "tiny", "training_file": file_id, "adapter": {"basis": "lora_sb"}}
    )
    own_basis = await client.post(BASES, json={"method": "lora_sb", "calibration_file": file_id})

    for reply, param in ((own_job, "adapter.basis"), (own_basis, "method")):
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (409, "basis_quota_exceeded", param)
    await create(client, file_id)  # everybody's bases are free
    assert (await build(client))["status"] == "queued"
