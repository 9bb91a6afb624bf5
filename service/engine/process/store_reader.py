"""What the engine lacks, from the store: adapters by one MGET, bases one at a time, each or its error.

A store that does not answer is asked again for a few seconds; a request that waits for an adapter is worth
that, and the others go on meanwhile. Nothing is remembered here, so what was missing once is looked up again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from service.engine.adapters.packed_adapter import PackedAdapter, SlotFormat
from tessera.errors import (
    AdapterReplaced,
    BasisMismatch,
    CorruptRecord,
    NotFound,
    RequestFailed,
    TesseraError,
    Unavailable,
)
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore

logger = logging.getLogger(__name__)

#: How long a store outage may last before it costs the requests that wait for it. A restart takes about 1 s.
RETRY_S = 5.0
#: Parsed in the event loop: 0.05 to 0.2 ms for an adapter of 115 kB, 16 of which come together, while a
#: thread beside has to wait for the engine's thread to let it run, and the loop again for the result.
MAX_INLINE_BYTES = 2 * 1024**2
_FIRST_DELAY_S = 0.1
_MAX_DELAY_S = 1.0

T = TypeVar("T")


class StoreReader:
    """Reads adapters and bases; a failure is a value, because each belongs to other requests."""

    def __init__(self, adapters: AdapterStore, bases: BasisStore) -> None:
        self._adapters = adapters
        self._bases = bases

    async def read_adapters(
        self, refs: Sequence[AdapterRef], slot_format: SlotFormat
    ) -> list[PackedAdapter | TesseraError]:
        """Per ref the adapter, packed, or NotFound, AdapterReplaced, CorruptRecord, BasisMismatch or
        StoreUnavailable."""
        fetched = await _attempt(lambda: self._adapters.fetch(refs))
        if isinstance(fetched, TesseraError):
            return [fetched] * len(refs)
        if sum(len(blob) for blob in fetched if blob is not None) <= MAX_INLINE_BYTES:
            return parse_adapters(refs, fetched, slot_format)
        return await asyncio.to_thread(parse_adapters, refs, fetched, slot_format)

    async def read_basis(self, basis_id: str) -> Basis | TesseraError:
        """The basis, or NotFound, CorruptRecord or StoreUnavailable."""
        return await _attempt(lambda: self._bases.get(basis_id))


def parse_adapters(
    refs: Sequence[AdapterRef], blobs: Sequence[bytes | None], slot_format: SlotFormat
) -> list[PackedAdapter | TesseraError]:
    return [parse_adapter(ref, blob, slot_format) for ref, blob in zip(refs, blobs, strict=True)]


def parse_adapter(
    ref: AdapterRef, blob: bytes | None, slot_format: SlotFormat
) -> PackedAdapter | TesseraError:
    """The adapter in `blob`, packed, if it is the one that `ref` names, else what is wrong with it."""
    try:
        return slot_format.pack(Adapter.of_version(ref, blob))
    except (NotFound, AdapterReplaced) as error:
        return error
    except (CorruptRecord, BasisMismatch) as error:
        return type(error)(f"adapter {ref.adapter_id}, version {ref.version}: {error.message}")
    except Exception as error:  # whatever the bytes of one record do, they do it to that record's requests
        return CorruptRecord(f"adapter {ref.adapter_id}, version {ref.version}: unreadable record: {error!r}")


async def _attempt(read: Callable[[], Awaitable[T]]) -> T | TesseraError:
    """`read()`, again and again for RETRY_S while the store is unavailable; any failure as a value."""
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
        except Exception as error:  # a request that waits for this must end, whatever happened
            logger.exception("reading from the store failed")
            return RequestFailed(f"reading from the store failed: {error!r}")
        await asyncio.sleep(delay_s)
        delay_s = min(2 * delay_s, _MAX_DELAY_S)
