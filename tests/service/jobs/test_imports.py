"""POST /v1/adapters/{id}/peft accepts our own exports and what PEFT saves, and refuses damaged files."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import zipfile
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from redis.asyncio import Redis
from torch import Tensor

from service.http.middleware import MAX_IMPORTS
from service.jobs.heavy_work import ImportTarget
from service.jobs.imports import Imports
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import AdapterDeleted, NotFound, QuotaExceeded
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis, make_basis
from tessera.formats.manifest import ModuleShape
from tessera.formats.single_adapter import SingleAdapter
from tessera.model.layout import linear_shapes
from tessera.peft.exporting import to_peft
from tessera.peft.files import PeftFiles
from tessera.peft.importing import read_peft, to_single_adapter
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore
from tessera.store.ownership import Ownership, PrivateBases
from tests.fakes import FakeEngine
from tests.service.answers import check_error
from tests.service.conftest import MakeApp, client_of
from tests.stepping import Gate, Stepped, SteppedRedis
from tests.waiting import wait_until

URL = "/v1/adapters/anna/peft"
MODEL_ID = "0" * 64  # the fake engine's
Q, K = (f"model.layers.0.self_attn.{kind}_proj" for kind in "qk")
SHAPES = [ModuleShape(Q, 256, 256), ModuleShape(K, 256, 128)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def foreign_files(rank: int = 3) -> PeftFiles:
    """A LoRA of two modules that this service has not made."""
    tensors = {}
    for shape in SHAPES:
        tensors[f"base_model.model.{shape.name}.lora_A.weight"] = random(rank, shape.d_in)
        tensors[f"base_model.model.{shape.name}.lora_B.weight"] = random(shape.d_out, rank)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "a/tiny"}
    return PeftFiles(json.dumps(config).encode(), safetensors.torch.save(tensors))


def shared_basis(model_id: str = MODEL_ID) -> Basis:
    factors = {shape: (random(4, shape.d_in), random(shape.d_out, 4)) for shape in SHAPES}
    return make_basis(model_id=model_id, method="lora_xs", factors=factors, recipe={})


def zipped(files: dict[str, bytes], **options: Any) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", **options) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return archive.getvalue()


def delta(files: PeftFiles, module: str) -> Tensor:
    tensors, config = safetensors.torch.load(files.adapter_model), json.loads(files.adapter_config)
    A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    return B @ A * config["lora_alpha"] / config["r"]


async def send(client: httpx.AsyncClient, content: bytes, url: str = URL) -> httpx.Response:
    return await client.post(url, files={"file": ("lora.zip", content)})


async def send_files(client: httpx.AsyncClient, files: PeftFiles, url: str = URL) -> httpx.Response:
    parts = {"adapter_config": files.adapter_config, "adapter_model": files.adapter_model}
    return await client.post(url, files={name: (name, content) for name, content in parts.items()})


async def exported(client: httpx.AsyncClient, url: str = URL) -> PeftFiles:
    archive = zipfile.ZipFile(io.BytesIO((await client.get(url)).content))
    return PeftFiles(*(archive.read(f"adapter_{name}") for name in ("config.json", "model.safetensors")))


def tinylora_files(u: int = 3, seed: int = 0) -> tuple[PeftFiles, dict[str, Tensor]]:
    """A TinyLoRA of two modules that share one vector, and the changes that it makes."""
    v = random(u, seed=seed)
    tensors, changes = {"base_model.tinylora_v.0": v}, {}
    for shape in SHAPES:
        A, B, P = random(2, shape.d_in, seed=5), random(shape.d_out, 2, seed=6), random(u, 2, 2, seed=7)
        for part, value in (("A", A), ("B", B), ("P", P)):
            tensors[f"base_model.model.{shape.name}.tinylora_{part}"] = value
        changes[shape.name] = B @ torch.einsum("i,ijk->jk", v, P) @ A
    config = {"peft_type": "TINYLORA", "r": 2, "u": u, "weight_tying": 1.0, "save_projection": True}
    return PeftFiles(json.dumps(config).encode(), safetensors.torch.save(tensors)), changes


async def test_tinyloras_of_one_model_become_adapters_of_one_private_basis(
    client: httpx.AsyncClient, redis: Redis
) -> None:
    found = {}
    for name, seed in (("anna", 1), ("ben", 2)):
        files, changes = tinylora_files(seed=seed)
        url = f"/v1/adapters/{name}/peft"
        reply = await send_files(client, files, url)
        assert reply.status_code == 200, reply.text
        [found[name]] = reply.json()["versions"]
        written = await exported(client, url)
        for module, expected in changes.items():
            torch.testing.assert_close(delta(written, module), expected, rtol=1e-4, atol=1e-4)
    assert found["anna"]["basis"] == found["ben"]["basis"]
    reply = await client.get("/v1/adapters/ben/peft?peft_type=TINYLORA")
    archive = zipfile.ZipFile(io.BytesIO(reply.content))
    v = safetensors.torch.load(archive.read("adapter_model.safetensors"))["base_model.tinylora_v.0"]
    assert torch.equal(v, random(3, seed=2))
    assert found["anna"]["bytes"] < 128 + 100 + 3 * 4 + 1  # header, provenance and three numbers
    assert len([key async for key in redis.scan_iter(match="*:owners")]) == 1


async def test_a_tinylora_without_p_is_refused_by_the_key(client: httpx.AsyncClient) -> None:
    files, _ = tinylora_files()
    config = {**json.loads(files.adapter_config), "save_projection": False}
    reply = await send_files(client, PeftFiles(json.dumps(config).encode(), files.adapter_model))
    error = check_error(reply, 400)
    assert (error["code"], error["param"]) == ("invalid_peft_adapter", "adapter_config.save_projection")
    assert "save_pretrained" in error["message"]


async def test_our_own_export_comes_back_as_a_version_in_its_basis(
    client: httpx.AsyncClient, redis: Redis, adapters: AdapterStore
) -> None:
    basis = shared_basis()
    await BasisStore(redis).put(basis)
    R = random(2, 4, 4, seed=1).half().float()
    await adapters.publish("default", "anna", Adapter(basis.basis_id, R), dtype=torch.float32)

    reply = await send(client, (await client.get(URL)).content)

    assert reply.status_code == 200, reply.text
    [first, second] = reply.json()["versions"]
    assert (reply.json()["active_version"], second["basis"], second["dtype"]) == (
        2,
        basis.basis_id,
        "float16",
    )
    assert second["bytes"] < first["bytes"] + 200
    ref = await adapters.resolve("default", "anna")
    [blob] = await adapters.fetch([ref])
    assert blob is not None
    torch.testing.assert_close(Adapter.from_bytes(blob).R, R, rtol=1e-3, atol=1e-5)
    assert not [key async for key in redis.scan_iter(match="*:owners")]


async def test_a_foreign_lora_gets_a_basis_of_its_own_and_takes_it_along_when_it_goes(
    client: httpx.AsyncClient, redis: Redis, engine: FakeEngine
) -> None:
    files = foreign_files()
    made = await send_files(client, files)
    assert made.status_code == 200, made.text
    [version] = made.json()["versions"]
    assert (version["rank"], version["dtype"], version["metadata"]["base_model"]) == (3, "float32", "a/tiny")
    assert [basis["id"] for basis in (await client.get("/v1/bases")).json()["data"]] == [version["basis"]]
    back = await exported(client)
    for shape in SHAPES:
        torch.testing.assert_close(delta(back, shape.name), delta(files, shape.name), rtol=1e-4, atol=1e-4)

    copy = await send(client, (await client.get(URL)).content, "/v1/adapters/bert/peft")
    assert copy.json()["versions"][0]["basis"] == version["basis"], "nothing is stored twice"
    await client.delete("/v1/adapters/anna")
    assert (await client.get("/v1/adapters/bert/peft")).status_code == 200
    await client.delete("/v1/models/bert")
    assert not [key async for key in redis.scan_iter(match=f"*{version['basis']}*")]
    assert engine.unloaded == [("default", "anna"), ("default", "bert")]


async def test_a_deletion_that_was_cut_off_is_finished_by_the_next(
    client: httpx.AsyncClient, redis: Redis, adapters: AdapterStore
) -> None:
    basis_id = (await send_files(client, foreign_files())).json()["versions"][0]["basis"]
    assert await adapters.delete("default", "anna")  # the service died at this point
    check_error(await client.delete("/v1/adapters/anna"), 404)
    assert not [key async for key in redis.scan_iter(match=f"*{basis_id}*")]


async def test_a_zip_may_have_folders_other_files_and_compression(client: httpx.AsyncClient) -> None:
    files = foreign_files()
    content = {
        "../../README.md": b"x",
        "a\\b/adapter_config.json": files.adapter_config,
        "/etc/adapter_model.safetensors": files.adapter_model,
    }
    reply = await send(client, zipped(content, compression=zipfile.ZIP_DEFLATED))
    assert reply.status_code == 200, reply.text


def bad_zips() -> dict[str, tuple[bytes, str]]:
    files = dict(foreign_files().items())
    config, model = files.items()
    good = zipped(files)
    encrypted = bytearray(good)
    encrypted[good.index(b"PK\1\2") + 8] |= 1
    large_index = good[:-22] + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, 2**31, 0, 0)
    return {
        "no zip": (b"hello", "not a zip"),
        "empty": (b"", "not a zip"),
        "cut": (good[:-5], "not a zip"),
        "beheaded": (good[200:], "cannot be"),
        "comment": (good[:-2] + b"\3\0abc", "not a zip"),
        "one file": (zipped(dict([config])), "no adapter_model.safetensors; pickled"),
        "pickle": (zipped(dict([config]) | {"adapter_model.bin": b"\x80\x04."}), "never opened"),
        "twice": (zipped(files | {"x/adapter_config.json": b"{}"}), "more than once; zip the folder of one"),
        "mlx-lm": (
            zipped(dict([config]) | {"adapters.safetensors": b"", "0000100_adapters.safetensors": b""}),
            "it is an adapter of mlx-lm; write lora_a and lora_b of each layer",
        ),
        "shards": (
            zipped(dict([config]) | {"a/adapter_model-00001-of-00002.safetensors": b""}),
            "its tensors are in several files",
        ),
        "model": (zipped({"config.json": b"{}", "model.safetensors": b""}), "serve it as a base model"),
        "encrypted": (bytes(encrypted), "encrypted"),
        "odd method": (zipped(files, compression=zipfile.ZIP_LZMA), "not compressed with deflate"),
        "index": (large_index, "index"),
        "bomb": (
            zipped(files | {model[0]: bytes(2**22)}, compression=zipfile.ZIP_DEFLATED), "unpacks to more"
        ),
        "wordy config": (
            zipped(files | {config[0]: b" " * 2**22}, compression=zipfile.ZIP_DEFLATED), "unpacks to more"
        ),
        "spoiled": (good.replace(b"lora_alpha", b"lora_alphx"), "CRC"),
        "wrong content": (zipped(files | {model[0]: b"x" * 30}), "safetensors"),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_zips())
async def test_a_zip_that_cannot_be_imported_is_refused(
    make_app: MakeApp, adapters: AdapterStore, case: str
) -> None:
    content, words = bad_zips()[case]
    async with client_of(make_app(max_import_bytes=2**21)) as client:
        error = check_error(await send(client, content), 400)
    assert error["code"] == "invalid_peft_adapter"
    assert words in error["message"]
    assert await adapters.count() == 0


async def test_a_wrong_request_is_named(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    files = foreign_files()
    good = zipped(dict(files.items()))
    for parts in ({"file": good, "adapter_config": b"{}"}, {"adapter_model": files.adapter_model}):
        named = {name: (name, content) for name, content in parts.items()}
        error = check_error(await client.post(URL, files=named), 400)
        assert (error["param"], error["code"]) == ("file", "missing_required_parameter")
    assert check_error(await client.post(URL), 400)["code"] == "missing_required_parameter"
    assert check_error(await send(client, good, "/v1/adapters/A!/peft"), 400)["param"] == "adapter_id"
    assert check_error(await send(client, good, "/v1/adapters/tiny/peft"), 400)["param"] == "adapter_id"
    engine.is_ready = False
    check_error(await send(client, good), 503)


async def test_a_large_body_is_refused_and_others_keep_their_limit(make_app: MakeApp) -> None:
    async with client_of(make_app(max_import_bytes=5000, max_body_bytes=2000)) as client:
        check_error(await send(client, bytes(6000)), 413)
        check_error(await send(client, bytes(3000)), 400)
        check_error(await client.post("/v1/completions", content=bytes(3000)), 413)


async def test_only_so_many_imports_are_read_at_once(client: httpx.AsyncClient) -> None:
    begun, go_on = [], asyncio.Event()

    async def slow_body() -> AsyncIterator[bytes]:
        begun.append(1)
        await go_on.wait()
        yield b"--x--"

    headers = {"content-type": "multipart/form-data; boundary=x"}
    slow = [
        asyncio.create_task(client.post(URL, content=slow_body(), headers=headers))
        for _ in range(MAX_IMPORTS)
    ]
    await wait_until(lambda: len(begun) == MAX_IMPORTS)
    error = check_error(await send(client, b"x"), 503)
    assert error["code"] == "service_overloaded"
    assert (await client.get("/v1/adapters")).status_code == 200
    go_on.set()
    assert {reply.status_code for reply in await asyncio.gather(*slow)} == {400}
    check_error(await send(client, b"x"), 400)


# Two tenants, over the same store


def imports_over(redis: Redis, *, max_bytes: int = 2**20) -> tuple[Imports, PrivateBases]:
    own = PrivateBases(redis, max_bytes=max_bytes)
    return Imports(
        AdapterStore(redis), BasisStore(redis), own, base_model=str(BUNDLED_MODEL), revision=None,
        dtype=torch.float16,
    ), own  # fmt: skip


async def test_another_tenants_basis_is_not_joined_but_paid_for(redis: Redis) -> None:
    imports, own = imports_over(redis)
    first = await imports.from_peft(ImportTarget("t1", "a", MODEL_ID), foreign_files())
    basis = await BasisStore(redis).get(first.basis_id)
    [blob] = await AdapterStore(redis).fetch([await AdapterStore(redis).resolve("t1", "a")])
    assert blob is not None
    labelled = to_peft(basis, Adapter.from_bytes(blob), base_model="tiny")
    second = await imports.from_peft(ImportTarget("t2", "a", MODEL_ID), labelled)
    assert await own.of_tenant("t2") == {second.basis_id: basis.manifest.factor_bytes}
    with pytest.raises(NotFound):
        await own.check_access("t3", second.basis_id)


async def test_what_exceeds_the_quota_leaves_nothing_behind(redis: Redis) -> None:
    size = 4 * 3 * sum(shape.d_in + shape.d_out for shape in SHAPES)
    imports, _ = imports_over(redis, max_bytes=size - 1)
    with pytest.raises(QuotaExceeded):
        await imports.from_peft(ImportTarget("t1", "a", MODEL_ID), foreign_files())
    assert not [key async for key in redis.scan_iter()]
    exact, _ = imports_over(redis, max_bytes=size)
    await exact.from_peft(ImportTarget("t1", "a", MODEL_ID), foreign_files())


class DeletingBases(BasisStore):
    """Deletes the adapter of that name while the factors are being written."""

    async def put_private(self, basis: Basis, ownership: Ownership, *, step: Tensor | None = None) -> None:
        await super().put_private(basis, ownership, step=step)
        await AdapterStore(self._redis).delete("t1", "a")


async def test_an_adapter_deleted_while_it_was_imported_stays_deleted(redis: Redis) -> None:
    adapters, own = AdapterStore(redis), PrivateBases(redis, max_bytes=2**20)
    await adapters.publish("t1", "a", Adapter("b" * 64, torch.zeros(1, 2, 2)), dtype=torch.float32)
    imports = Imports(
        adapters, DeletingBases(redis), own, base_model=str(BUNDLED_MODEL), revision=None, dtype=torch.float16
    )
    with pytest.raises(AdapterDeleted):
        await imports.from_peft(ImportTarget("t1", "a", MODEL_ID), foreign_files())
    assert await own.of_tenant("t1") == {}
    assert not [key async for key in redis.scan_iter(match="*{basis:*")]


async def test_an_import_outlives_the_end_of_another_one_of_the_same_lora(redis: Redis) -> None:
    """The other import fails at any moment, and removes the basis that both of them store."""
    for num_commands in count():
        await redis.flushall()
        gate = Gate()
        imports, _ = imports_over(SteppedRedis(redis, gate))
        work = Stepped(gate, imports.from_peft(ImportTarget("t1", "a", MODEL_ID), foreign_files()))
        has_more = await work.advance(num_commands)
        own, failing = PrivateBases(redis, max_bytes=2**20), stored_lora().basis
        if await own.reserve("t1", failing.manifest):
            await own.discard("t1", failing.basis_id)
        version = await work.finish()
        assert version.basis_id == failing.basis_id
        await BasisStore(redis).get(version.basis_id)
        assert await own.users("t1", version.basis_id) == {"a"}
        if not has_more:
            assert num_commands > 10
            return


def stored_lora() -> SingleAdapter:
    files = foreign_files()
    shapes = linear_shapes(str(BUNDLED_MODEL), revision=None)
    return to_single_adapter(read_peft(files.adapter_config, files.adapter_model, shapes), model_id=MODEL_ID)


async def test_a_label_of_another_base_model_is_not_believed(redis: Redis, tmp_path: Path) -> None:
    basis = shared_basis("1" * 64)
    await BasisStore(redis).put(basis)
    imports, own = imports_over(redis)
    files = to_peft(basis, Adapter(basis.basis_id, torch.ones(2, 4, 4)), base_model="tiny")
    version = await imports.from_peft(ImportTarget("t1", "a", MODEL_ID), files)
    assert list(await own.of_tenant("t1")) == [version.basis_id]
    assert (await BasisStore(redis).manifest(version.basis_id)).model_id == MODEL_ID
