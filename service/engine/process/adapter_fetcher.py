"""Fetch what the engine lacks from the store: adapters by one MGET, bases one at a time.

A fetch starts when a request for the adapter arrives, not when the engine notices between two steps that it
lacks it: on a busy device that is a step earlier (10 to 30 ms). So most adapters are already being fetched
when the engine asks for them. Each adapter is fetched once, and those of one moment travel together.

A read is repeated for a few seconds if the store does not answer. This delays only the requests that need the
adapter; all others continue. Failures are not cached, so an adapter that was missing once is looked up again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from service.engine.adapters.packed_adapter import PackedAdapter, SlotFormat
from service.engine.process.engine_thread import EngineThread
from tessera.errors import (
    AdapterReplaced,
    BasisMismatch,
    CorruptRecord,
    NotFound,
    RequestFailed,
    TesseraError,
    Unavailable,
)
from tessera.formats.adapter import Adapter, holds_trained_numbers
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tessera.formats.cores import CoreParametrization
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore

logger = logging.getLogger(__name__)

#: Adapters read by one MGET. Of a larger group, the first are provided while the rest are still being read
#: and verified: at 115 kB each takes 0.1 ms, so 256 at once would keep the first one waiting for 28 ms.
MAX_READ = 16
#: How long a store outage may last before it fails the requests that wait. A restart takes about 1 s.
RETRY_S = 5.0
#: Bytes up to which adapters are parsed in the event loop: 0.05 to 0.2 ms for an adapter of 115 kB, 16 of
#: which come together. A thread beside it would have to wait until the engine's thread lets it run, and the
#: loop again for the result.
MAX_INLINE_BYTES = 2 * 1024**2
#: Bases whose `cores` are kept for adapters that are stored as trained numbers. With 64 numbers per module at
#: rank 16, those of an 8B model have 29 MB.
MAX_CORES = 8
_FIRST_DELAY_S = 0.1
_MAX_DELAY_S = 1.0

T = TypeVar("T")


class AdapterFetcher:
    """Fetches adapters and bases with `reader` and provides them to the engine of `thread`.

    Lives in the asyncio loop.
    """

    def __init__(self, reader: StoreReader, thread: EngineThread) -> None:
        self._reader = reader
        self._thread = thread
        self._being_fetched: set[AdapterRef] = set()
        self._next: list[AdapterRef] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def fetch_ahead(self, ref: AdapterRef) -> None:
        """Fetch the adapter of a request that the engine will see only after the running step, unless it is
        here. `Engine.holds` may be asked from this thread: an outdated answer costs a fetch, or its delay."""
        if not self._thread.engine.holds(ref):
            self.fetch([ref])

    def fetch(self, refs: Iterable[AdapterRef]) -> None:
        """Fetch these adapters, except those that are being fetched already. All that is requested before the
        event loop runs again travels together."""
        for ref in refs:
            if ref in self._being_fetched:
                continue
            self._being_fetched.add(ref)
            self._next.append(ref)
            if len(self._next) == 1:
                asyncio.get_running_loop().call_soon(self._start_reads)

    def fetch_basis(self, basis_id: str) -> None:
        """Fetch a basis. The engine requests each one once."""
        self._spawn(self._read_basis(basis_id))

    def _start_reads(self) -> None:
        refs, self._next = self._next, []
        for start in range(0, len(refs), MAX_READ):
            self._spawn(self._read_adapters(refs[start : start + MAX_READ]))

    async def _read_adapters(self, refs: Sequence[AdapterRef]) -> None:
        for ref, found in zip(refs, await self._reader.read_adapters(refs), strict=True):
            if isinstance(found, TrainedNumbers):
                self._spawn(self._expand(found))  # the others need not wait for a basis
            else:
                self._provide_adapter(ref, found)

    async def _expand(self, found: TrainedNumbers) -> None:
        self._provide_adapter(found.ref, await self._reader.expand(found))

    def _provide_adapter(self, ref: AdapterRef, found: PackedAdapter | TesseraError) -> None:
        def reply(error: TesseraError | None) -> None:
            if error is not None and not isinstance(found, TesseraError):
                self._provide_adapter(ref, error)  # the engine cannot use it, so its requests fail with that
            else:
                self._being_fetched.discard(ref)  # from now on it may be requested again

        self._thread.post(lambda engine: engine.provide_adapter(ref, found), reply)

    async def _read_basis(self, basis_id: str) -> None:
        self._provide_basis(basis_id, await self._reader.read_basis(basis_id))

    def _provide_basis(self, basis_id: str, found: Basis | TesseraError) -> None:
        def reply(error: TesseraError | None) -> None:
            if error is not None and not isinstance(found, TesseraError):
                self._provide_basis(basis_id, error)

        self._thread.post(lambda engine: engine.provide_basis(basis_id, found), reply)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop itself keeps only weak references
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._thread.on_failure(error)


@dataclass(frozen=True)
class TrainedNumbers:
    """An adapter whose R follows from trained numbers and from its basis, which is not at hand."""

    ref: AdapterRef
    blob: bytes


class StoreReader:
    """Reads adapters, packed in `slot_format`, and bases. A failure is returned as a value, because each
    belongs to other requests."""

    def __init__(self, adapters: AdapterStore, bases: BasisStore, slot_format: SlotFormat) -> None:
        self._adapters = adapters
        self._bases = bases
        self._slot_format = slot_format
        #: How trained numbers become R, for the bases of such adapters, the least recently used first.
        self._cores: OrderedDict[str, CoreParametrization] = OrderedDict()
        self._reading_cores = asyncio.Lock()

    async def read_adapters(
        self, refs: Sequence[AdapterRef]
    ) -> list[PackedAdapter | TrainedNumbers | TesseraError]:
        """Return for each ref the packed adapter, or NotFound, AdapterReplaced, CorruptRecord, BasisMismatch
        or StoreUnavailable; or what `expand` has to be called with."""
        fetched = await _attempt(lambda: self._adapters.fetch(refs))
        if isinstance(fetched, TesseraError):
            return [fetched] * len(refs)
        if sum(len(blob) for blob in fetched if blob is not None) <= MAX_INLINE_BYTES:
            return parse_adapters(refs, fetched, self._slot_format)
        return await asyncio.to_thread(parse_adapters, refs, fetched, self._slot_format)

    async def expand(self, found: TrainedNumbers) -> PackedAdapter | TesseraError:
        """Return the packed adapter, or an error of `read_adapters` or `read_basis`."""
        ref = found.ref
        async with self._reading_cores:
            cores = self._cores.get(ref.basis_id)
            if cores is None:
                basis = await self.read_basis(ref.basis_id)
                if isinstance(basis, TesseraError):
                    return basis
                cores = self._cores[ref.basis_id] = await asyncio.to_thread(lambda: basis.cores)
                while len(self._cores) > MAX_CORES:
                    self._cores.popitem(last=False)
            self._cores.move_to_end(ref.basis_id)
        parsed = await asyncio.to_thread(parse_adapter, ref, found.blob, self._slot_format, cores)
        assert not isinstance(parsed, TrainedNumbers)
        return parsed

    async def read_basis(self, basis_id: str) -> Basis | TesseraError:
        """Return the basis, or NotFound, CorruptRecord or StoreUnavailable."""
        return await _attempt(lambda: self._bases.get(basis_id))


def parse_adapters(
    refs: Sequence[AdapterRef], blobs: Sequence[bytes | None], slot_format: SlotFormat
) -> list[PackedAdapter | TrainedNumbers | TesseraError]:
    return [parse_adapter(ref, blob, slot_format) for ref, blob in zip(refs, blobs, strict=True)]


def parse_adapter(
    ref: AdapterRef,
    blob: bytes | None,
    slot_format: SlotFormat,
    cores: CoreParametrization | None = None,
) -> PackedAdapter | TrainedNumbers | TesseraError:
    """Return the packed adapter in `blob` if it is the one that `ref` names, otherwise the error.

    cores: those of its basis. Without them an adapter that is stored as trained numbers is returned as such.
    """
    if blob is not None and cores is None and holds_trained_numbers(blob):
        return TrainedNumbers(ref, blob)
    try:
        return slot_format.pack(Adapter.of_version(ref, blob, cores))
    except (NotFound, AdapterReplaced) as error:
        return error
    except (CorruptRecord, BasisMismatch) as error:
        return type(error)(f"adapter {ref.adapter_id}, version {ref.version}: {error.message}")
    # whatever the bytes of a record cause, it may affect that record's requests only
    except Exception as error:
        return CorruptRecord(f"adapter {ref.adapter_id}, version {ref.version}: unreadable record: {error!r}")


async def _attempt(read: Callable[[], Awaitable[T]]) -> T | TesseraError:
    """Return the result of `read()`, repeated for RETRY_S while the store is unavailable; any failure as a
    value."""
    give_up_at = time.monotonic() + RETRY_S
    delay_s = _FIRST_DELAY_S
    while True:
        try:
            return await read()
        except Unavailable as error:
            if time.monotonic() + delay_s > give_up_at:
                return error
        except TesseraError as error:
            return error
        except Exception as error:  # the requests that wait for this must end, whatever happened
            logger.exception("reading from the store failed")
            return RequestFailed(f"reading from the store failed: {error!r}")
        await asyncio.sleep(delay_s)
        delay_s = min(2 * delay_s, _MAX_DELAY_S)
