"""Adapters in host memory, packed for the slots: the tier between the store and the device.

Least recently used go first when the bytes exceed the limit, but never one that a waiting request needs: it
would have to be fetched again before that request could begin. So the cache may exceed its limit, by what the
waiting requests need and no more.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from service.engine.adapters.packed_adapter import PackedAdapter
from tessera.formats.adapter_ref import AdapterRef


class AdapterCache:
    """At most `max_bytes` of adapters that nobody waits for."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_loads = self.num_evictions = 0
        self._adapters: OrderedDict[AdapterRef, PackedAdapter] = OrderedDict()  # least recently used first
        self._retained: Counter[AdapterRef] = Counter()

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def refs(self) -> list[AdapterRef]:
        return list(self._adapters)

    def get(self, ref: AdapterRef) -> PackedAdapter | None:
        adapter = self._adapters.get(ref)
        if adapter is not None:
            self._adapters.move_to_end(ref)
        return adapter

    def put(self, ref: AdapterRef, adapter: PackedAdapter) -> None:
        self.drop(ref)
        self._adapters[ref] = adapter
        self.num_bytes += adapter.nbytes
        self.num_loads += 1
        self._evict()

    def drop(self, ref: AdapterRef) -> None:
        adapter = self._adapters.pop(ref, None)
        if adapter is not None:
            self.num_bytes -= adapter.nbytes

    def retain(self, ref: AdapterRef) -> None:
        """One waiting request more needs `ref`."""
        self._retained[ref] += 1

    def release(self, ref: AdapterRef) -> None:
        """One waiting request less needs `ref`."""
        self._retained[ref] -= 1
        if self._retained[ref] == 0:
            del self._retained[ref]
            self._evict()

    def check_integrity(self) -> None:
        assert self.num_bytes == sum(adapter.nbytes for adapter in self._adapters.values())
        assert all(count > 0 for count in self._retained.values())
        assert self.num_bytes <= self.max_bytes or all(ref in self._retained for ref in self._adapters)

    def _evict(self) -> None:
        if self.num_bytes <= self.max_bytes:
            return
        for ref in [ref for ref in self._adapters if ref not in self._retained]:
            self.drop(ref)
            self.num_evictions += 1
            if self.num_bytes <= self.max_bytes:
                return
