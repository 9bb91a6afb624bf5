"""Run the few requests that need torch in processes of their own, so that an API process never loads it.

They read the base model's layers (for jobs that are submitted), import a LoRA, or export an adapter. A fork
of the twin imports torch, does the work, replies and ends: a rare request takes some seconds, but no API
process needs the 300 MB of torch. Without a twin the work is done in this process.

    request   one line of JSON, then the bytes that belong to it
    reply     b"v" and the result, or b"e" and the error as JSON
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from service.processes.fair_gate import FairGate
from service.processes.twin import Limits, Twin, Work
from tessera import errors
from tessera.errors import RequestFailed, TesseraError
from tessera.formats.manifest import ModuleShape
from tessera.peft.files import PeftFiles
from tessera.redis.client import Client, connect
from tessera.settings import CommonSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Reading a LoRA of 512 MB takes several times its size, and decomposing it takes minutes of processor time.
LIMITS = Limits(max_cpu_s=900, max_memory_bytes=8 * 1024**3)
_LAYERS, _IMPORT, _EXPORT = b"l", b"i", b"x"
LIMITS_BY_NAME = dict.fromkeys((_LAYERS, _IMPORT, _EXPORT), LIMITS)
_VALUE, _ERROR = b"v", b"e"


@dataclass(frozen=True)
class ImportTarget:
    """The adapter that an import publishes."""

    tenant: str
    adapter_id: str
    #: Digest of the base model.
    model_id: str


@dataclass(frozen=True)
class ExportSource:
    """The adapter version to export."""

    tenant: str
    adapter_id: str
    #: None: the active version.
    version: int | None
    #: Written into the export as `base_model_name_or_path`.
    base_model: str
    #: LORA or TINYLORA.
    peft_type: str = "LORA"


class HeavyWork:
    """Runs the work. twin: runs it with `heavy_works`, in forks that connect to `store_url`; None: use
    `redis` here."""

    def __init__(
        self, redis: Client, common: CommonSettings, *, twin: Twin | None = None, store_url: str | None = None
    ) -> None:
        self._redis = redis
        self._common = common
        self._twin = twin
        self._store_url = store_url
        self._layers: dict[str, ModuleShape] = {}
        self._reading = asyncio.Lock()
        #: One import at a time: each needs several times its size in memory.
        self._importing = asyncio.Lock()
        #: Two exports at a time, of different tenants: each takes 0.4 GB for torch, beside the factors.
        self._exporting = FairGate(capacity=2, share=1)

    async def layers(self) -> dict[str, ModuleShape]:
        """Return the base model's linear layers by name. Raises `UnsupportedModel`."""
        async with self._reading:
            if not self._layers:
                if self._twin is None:
                    found = await asyncio.to_thread(_layers_of, self._common)
                else:
                    found = json.loads(await self._in_fork(self._twin, _LAYERS, {}))
                self._layers = {name: ModuleShape(name, d_in, d_out) for name, d_in, d_out in found}
        return self._layers

    async def import_lora(self, target: ImportTarget, files: PeftFiles) -> None:
        """Publish the LoRA as the adapter's next version. Raises what `Imports.from_peft` raises."""
        async with self._importing:
            if self._twin is None:
                await _import(self._redis, self._common, target, files)
                return
            head = {**asdict(target), "config_bytes": len(files.adapter_config)}
            await self._in_fork(self._twin, _IMPORT, head, files.adapter_config + files.adapter_model)

    async def export_zip(self, source: ExportSource) -> bytes:
        """Return the adapter as a zip of PEFT's files. Raises what `peft_zip` raises."""
        async with self._exporting.room(source.tenant):
            if self._twin is None:
                return await _export(self._redis, self._common, source)
            return await self._in_fork(self._twin, _EXPORT, asdict(source))

    async def _in_fork(self, twin: Twin, name: bytes, head: dict[str, Any], body: bytes = b"") -> bytes:
        line = json.dumps({**head, "store_url": self._store_url}).encode()
        reply = bytes(await twin.work(name, line + b"\n" + body))
        if not reply:
            raise RequestFailed(f"the work took more than {LIMITS}, or its process was ended")
        if reply[:1] == _ERROR:
            raise _read_error(reply[1:])
        return reply[1:]


def heavy_works(common: CommonSettings) -> dict[bytes, Work]:
    """Return the work by name, for `fork_twin`."""

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

    return {_LAYERS: _replying(layers), _IMPORT: _replying(import_lora), _EXPORT: _replying(export_zip)}


def _replying(work: Callable[[dict[str, Any], bytes], bytes]) -> Work:
    def reply(content: bytes) -> bytes:
        gc.enable()  # the twin switches it off, which suits work that makes little but small objects
        line, _, body = content.partition(b"\n")
        try:
            return _VALUE + work(json.loads(line), body)
        except TesseraError as error:
            return _ERROR + _error_as_json(error)
        except Exception:
            logger.exception("work in a process of its own failed")
            raise

    return reply


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
