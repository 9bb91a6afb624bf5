"""A fork of a twin without torch does the work that needs torch, with the same results as this process."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from redis.asyncio import Redis
from safetensors.torch import load, save

from service.jobs import heavy_work
from service.jobs.heavy_work import ExportSource, HeavyWork, ImportTarget
from service.processes.twin import Twin, fork_twin
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import InvalidInput, NotFound, RequestFailed, UnsupportedModel
from tessera.model.layout import linear_shapes
from tessera.peft.files import PeftFiles
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore

MODULE = "model.layers.1.mlp.down_proj"
TARGET = ImportTarget("t1", "mine", "0" * 64)


@pytest.fixture
def common(tmp_path: Path) -> CommonSettings:
    return CommonSettings(data_dir=tmp_path)


@pytest.fixture
def twin(common: CommonSettings) -> Iterator[Twin]:
    twin = fork_twin(heavy_work.heavy_works(common), limits=heavy_work.LIMITS_BY_NAME)
    yield twin
    twin.close()


def lora(rank: int = 3) -> PeftFiles:
    shape = linear_shapes(BUNDLED_MODEL)[MODULE]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{MODULE}.lora_A.weight": torch.randn(rank, shape.d_in, generator=generator),
        f"base_model.model.{MODULE}.lora_B.weight": torch.randn(shape.d_out, rank, generator=generator),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["down_proj"]}
    return PeftFiles(json.dumps(config).encode(), save(tensors))


@pytest.mark.parametrize("is_apart", [True, False])
async def test_a_lora_goes_in_and_comes_out_as_the_same_change(
    redis: Redis, redis_url: str, common: CommonSettings, twin: Twin, is_apart: bool
) -> None:
    work = HeavyWork(redis, common, twin=twin if is_apart else None, store_url=redis_url)
    assert await work.layers() == linear_shapes(BUNDLED_MODEL)
    files = lora()
    await work.import_lora(TARGET, files)
    record = await AdapterStore(redis).get("t1", "mine")
    assert record.active_version == 1
    content = await work.export_zip(ExportSource("t1", "mine", None, "tiny"))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        found = load(archive.read("adapter_model.safetensors"))
        config = json.loads(archive.read("adapter_config.json"))
    given = load(files.adapter_model)
    A, B = (f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB")
    expected = 2 * given[B] @ given[A]
    scale = config["lora_alpha"] / config["r"]
    torch.testing.assert_close(scale * found[B] @ found[A], expected, atol=1e-4, rtol=1e-4)


async def test_exports_take_turns(redis: Redis, redis_url: str, common: CommonSettings) -> None:
    """Each loads torch: many at once would take the machine's memory."""

    def work(content: bytes) -> bytes:
        time.sleep(0.2)
        return b"v" + str(time.monotonic()).encode()

    twin = fork_twin(dict.fromkeys(heavy_work.LIMITS_BY_NAME, work))
    try:
        apart = HeavyWork(redis, common, twin=twin, store_url=redis_url)
        sources = [ExportSource(tenant, "mine", None, "tiny") for tenant in ("t1", "t1", "t1", "t2")]
        ended = sorted(map(float, await asyncio.gather(*map(apart.export_zip, sources))))
    finally:
        twin.close()
    assert ended[-1] - ended[0] > 0.3, "one tenant's exports ran at the same time"


async def test_errors_keep_their_class_and_their_fields(
    redis: Redis, redis_url: str, common: CommonSettings, twin: Twin
) -> None:
    apart = HeavyWork(redis, common, twin=twin, store_url=redis_url)
    here = HeavyWork(redis, common)
    caught = []
    for work in (apart, here):
        with pytest.raises(NotFound) as missing:
            await work.export_zip(ExportSource("t1", "nobody", None, "tiny"))
        with pytest.raises(InvalidInput) as broken:
            await work.import_lora(TARGET, PeftFiles(b"{}", b"nonsense"))
        caught.append([(str(e.value), e.value.param, e.value.code) for e in (missing, broken)])
    assert caught[0] == caught[1]


async def test_a_model_without_layers_says_why(redis: Redis, redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    common = CommonSettings(data_dir=tmp_path, base_model=str(tmp_path))
    twin = fork_twin(heavy_work.heavy_works(common))
    try:
        with pytest.raises(UnsupportedModel, match="cannot load the base model"):
            await HeavyWork(redis, common, twin=twin, store_url=redis_url).layers()
    finally:
        twin.close()


async def test_work_that_is_ended_is_an_error_of_this_request(
    redis: Redis, redis_url: str, common: CommonSettings
) -> None:
    twin = fork_twin({name: lambda content: sys.exit(1) for name in heavy_work.LIMITS_BY_NAME})
    try:
        with pytest.raises(RequestFailed, match="was ended"):
            await HeavyWork(redis, common, twin=twin, store_url=redis_url).layers()
    finally:
        twin.close()
