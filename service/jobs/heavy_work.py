"""The few requests that need torch, in processes of their own, so that an API process never loads it.

The layers of the base model, for jobs that are submitted; a LoRA to import; an adapter to export. Each is
done by a fork of the twin, which imports torch, works, answers and ends: seconds for a rare request, instead
of 300 MB in every API process. Without a twin the work is done in this process.

    request   one line of JSON, then the bytes that belong to it
    answer    b"v" and the result, or b"e" and the error as JSON
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from service.processes.twin import Limits, Twin, Work
from tessera import errors
from tessera.errors import RequestFailed, TesseraError
from tessera.formats.manifest import ModuleShape
from tessera.peft.files import PeftFiles
from tessera.redis.client import Client, connect
from tessera.settings import CommonSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Reading a LoRA of 512 MB takes several times its size, and decomposing it some minutes of processor time.
LIMITS = Limits(max_cpu_s=900, max_memory_bytes=8 * 1024**3)
_LAYERS, _IMPORT, _EXPORT = b"l", b"i", b"x"
LIMITS_BY_NAME = dict.fromkeys((_LAYERS, _IMPORT, _EXPORT), LIMITS)
_VALUE, _ERROR = b"v", b"e"


@dataclass(frozen=True)
class ImportTarget:
    """Where an import goes: whose adapter, for the base model with this digest."""

    tenant: str
    adapter_id: str
    model_id: str


@dataclass(frozen=True)
class ExportSource:
    """What is exported. version None: the active one. base_model: written as `base_model_name_or_path`."""

    tenant: str
    adapter_id: str
    version: int | None
    base_model: str


class HeavyWork:
    """twin: of which `works` are a part; its forks connect to `store_url`. redis: for work without a twin."""

    def __init__(
        self, redis: Client, common: CommonSettings, *, twin: Twin | None = None, store_url: str | None = None
    ) -> None:
        self._redis, self._common = redis, common
        self._twin, self._store_url = twin, store_url
        self._layers: dict[str, ModuleShape] = {}
        self._reading = asyncio.Lock()
        #: One import at a time: each needs several times its size in memory.
        self._importing = asyncio.Lock()

    async def layers(self) -> dict[str, ModuleShape]:
        """The base model's linear layers by name. Raises `UnsupportedModel`."""
        async with self._reading:
            if not self._layers:
                if self._twin is None:
                    found = await asyncio.to_thread(_layers_of, self._common)
                else:
                    found = json.loads(await self._apart(self._twin, _LAYERS, {}))
                self._layers = {name: ModuleShape(name, d_in, d_out) for name, d_in, d_out in found}
        return self._layers

    async def import_lora(self, target: ImportTarget, files: PeftFiles) -> None:
        """Publish the LoRA as the adapter's next version. Raises what `Imports.from_peft` raises."""
        async with self._importing:
            if self._twin is None:
                await _import(self._redis, self._common, target, files)
                return
            head = {**asdict(target), "config_bytes": len(files.adapter_config)}
            await self._apart(self._twin, _IMPORT, head, files.adapter_config + files.adapter_model)

    async def export_zip(self, source: ExportSource) -> bytes:
        """The adapter as a zip of PEFT's files. Raises what `peft_zip` raises."""
        if self._twin is None:
            return await _export(self._redis, self._common, source)
        return await self._apart(self._twin, _EXPORT, asdict(source))

    async def _apart(self, twin: Twin, name: bytes, head: dict[str, Any], body: bytes = b"") -> bytes:
        line = json.dumps({**head, "store_url": self._store_url}).encode()
        answer = bytes(await twin.work(name, line + b"\n" + body))
        if not answer:
            raise RequestFailed(f"this took more than {LIMITS}, or was interrupted")
        if answer[:1] == _ERROR:
            raise _read_error(answer[1:])
        return answer[1:]


def works(common: CommonSettings) -> dict[bytes, Work]:
    """The work, for `fork_twin`."""

    def layers(head: dict[str, Any], body: bytes) -> bytes:
        return json.dumps(_layers_of(common)).encode()

    def import_lora(head: dict[str, Any], body: bytes) -> bytes:
        size = head.pop("config_bytes")
        files, url = PeftFiles(body[:size], body[size:]), head.pop("store_url")
        _with_store(url, common, lambda redis: _import(redis, common, ImportTarget(**head), files))
        return b""

    def export_zip(head: dict[str, Any], body: bytes) -> bytes:
        url = head.pop("store_url")
        return _with_store(url, common, lambda redis: _export(redis, common, ExportSource(**head)))

    return {_LAYERS: _answering(layers), _IMPORT: _answering(import_lora), _EXPORT: _answering(export_zip)}


def _answering(work: Callable[[dict[str, Any], bytes], bytes]) -> Work:
    def answer(content: bytes) -> bytes:
        gc.enable()  # the twin has switched it off, for work that makes little else than small objects
        line, _, body = content.partition(b"\n")
        try:
            return _VALUE + work(json.loads(line), body)
        except TesseraError as error:
            return _ERROR + _error_as_json(error)
        except Exception:
            logger.exception("work in a process of its own failed")
            raise

    return answer


def _with_store(url: str, common: CommonSettings, work: Callable[[Client], Awaitable[T]]) -> T:
    async def run() -> T:
        async with connect(url, timeout_s=common.store_timeout_s) as redis:
            return await work(redis)

    return asyncio.run(run())


def _layers_of(common: CommonSettings) -> list[tuple[str, int, int]]:
    from tessera.model.layout import linear_shapes

    shapes = linear_shapes(common.base_model, revision=common.base_model_revision)
    return [(shape.name, shape.d_in, shape.d_out) for shape in shapes.values()]


async def _import(redis: Client, common: CommonSettings, target: ImportTarget, files: PeftFiles) -> None:
    from service.jobs.imports import make_imports

    await make_imports(redis, common).from_peft(target, files)


async def _export(redis: Client, common: CommonSettings, source: ExportSource) -> bytes:
    from service.jobs.exports import peft_zip
    from tessera.store.adapters import AdapterStore
    from tessera.store.bases import BasisStore

    bases = BasisStore(redis, cache_dir=common.data_dir / "cache" / "bases")
    return await peft_zip(AdapterStore(redis), bases, **asdict(source))


def _error_as_json(error: TesseraError) -> bytes:
    fields = {
        "class": type(error).__name__,
        "message": error.message,
        "param": error.param,
        "code": error.code,
    }
    return json.dumps(fields).encode()


def _read_error(content: bytes) -> TesseraError:
    fields = json.loads(content)
    kind: type[TesseraError] = getattr(errors, fields["class"], RequestFailed)
    return kind(fields["message"], param=fields["param"], code=fields["code"])
