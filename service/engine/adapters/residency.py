"""The tiers of adapters above the store: host memory, and slots on the device.

    retain (a request waits) → is_ready → pin (it runs) → release (it has ended)

An adapter that is in neither tier is listed once as missing; the owner of the engine fetches it from the
store and provides it. Knows no request and no queue, only how many requests refer to an adapter.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from service.engine.adapters.packed_adapter import PackedAdapter
from service.engine.adapters.resident_bases import ResidentBases
from tessera.errors import BasisMismatch, TesseraError
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.head import ClassificationHead


class AdapterCache:
    """Adapters in host memory, packed for the slots: at most `max_bytes` of them, besides those in demand.

    When the bytes exceed the limit, the least recently used adapters go first, but never one that a waiting
    request needs: it would have to be fetched again before that request could start. So the cache may exceed
    its limit by what the waiting requests need.
    """

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
        """Return an adapter, which becomes the most recently used, or None."""
        adapter = self._adapters.get(ref)
        if adapter is not None:
            self._adapters.move_to_end(ref)
        return adapter

    def put(self, ref: AdapterRef, adapter: PackedAdapter) -> None:
        """Keep an adapter, and evict others if they take more than the limit."""
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
        """Note that one more waiting request needs `ref`."""
        self._retained[ref] += 1

    def release(self, ref: AdapterRef) -> None:
        """Note that one waiting request fewer needs `ref`."""
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


class Residency:
    """Knows for every adapter whether it is missing, requested, cached, resident or pinned."""

    def __init__(self, bases: ResidentBases, cache: AdapterCache) -> None:
        self.bases = bases
        self.cache = cache
        self.num_load_failures = 0
        self._users: Counter[AdapterRef] = Counter()
        self._missing: dict[AdapterRef, None] = {}
        self._requested: set[AdapterRef] = set()
        self._has_pinned = False  # since the last `load`
        self._unloaded: set[AdapterRef] = set()  # to be dropped when no longer used

    @property
    def has_missing(self) -> bool:
        return bool(self._missing) or self.bases.has_missing

    def retain(self, ref: AdapterRef) -> None:
        """Note that a request which needs `ref` waits."""
        self._users[ref] += 1
        self.bases.retain(ref.basis_id)
        self.cache.retain(ref)
        self.request(ref)

    def release(self, ref: AdapterRef, *, pinned_slot: int | None) -> None:
        """Note that a request which needed `ref` has ended, while waiting (None) or with a pinned slot."""
        if pinned_slot is None:
            self.cache.release(ref)
        else:
            self.bases.use(ref.basis_id).unpin(pinned_slot)
        self.bases.release(ref.basis_id)
        self._users[ref] -= 1
        if self._users[ref] == 0:
            del self._users[ref]
            if ref in self._unloaded:
                self._drop(ref)

    def request(self, ref: AdapterRef) -> None:
        """List `ref` and its basis as missing, unless they are here or being fetched."""
        self.bases.request(ref.basis_id)
        if ref not in self._requested and not self.holds(ref):
            self._requested.add(ref)
            self._missing[ref] = None

    def holds(self, ref: AdapterRef) -> bool:
        """Whether `ref` need not be fetched. Any thread may ask, because each look-up is one operation on a
        dict; the answer may be outdated when it arrives."""
        return ref in self.cache or self.is_resident(ref)

    def is_resident(self, ref: AdapterRef) -> bool:
        """Whether `ref` has a slot, so that `pin` succeeds even if all slots are pinned."""
        resident = self.bases.find(ref.basis_id)
        return resident is not None and ref in resident.slots

    def is_ready(self, ref: AdapterRef) -> bool:
        """Whether `pin` can succeed as soon as a slot is free. Raises `BasisMismatch` if it never can."""
        resident = self.bases.find(ref.basis_id)
        if resident is None:
            return False
        if ref in resident.slots:
            return True
        adapter = self.cache.get(ref)
        expected = (len(resident.manifest.modules), resident.manifest.rank)
        if adapter is not None and (adapter.num_modules, adapter.rank) != expected:
            self.cache.drop(ref)
            self.num_load_failures += 1
            raise BasisMismatch(
                f"adapter {ref.adapter_id} has {adapter.num_modules} modules of rank {adapter.rank}, "
                f"its basis has {expected[0]} of rank {expected[1]}"
            )
        return adapter is not None

    def head_of(self, ref: AdapterRef) -> ClassificationHead | None:
        """Return the classification head of an adapter that is ready, None if it does not classify."""
        if self.is_resident(ref):
            return self.bases.use(ref.basis_id).head_of(ref)
        adapter = self.cache.get(ref)
        return None if adapter is None else adapter.head

    def pin(self, ref: AdapterRef) -> int | None:
        """Pin an adapter that is ready and return its slot; None while every slot of its basis is pinned."""
        slot = self.bases.use(ref.basis_id).pin(ref, self.cache.get(ref))
        if slot is not None:
            self._has_pinned = True
            self.cache.release(ref)
        return slot

    def load(self) -> None:
        """Start loading everything that was pinned since the last call."""
        if self._has_pinned:
            self._has_pinned = False
            for table in self.bases.tables.values():
                table.load()

    def take_missing(self) -> list[AdapterRef]:
        """Return the adapters to fetch. Each is returned once until it is provided."""
        missing = list(self._missing)
        self._missing.clear()
        return missing

    def provide(self, ref: AdapterRef, adapter: Adapter | PackedAdapter | TesseraError) -> None:
        """Put a fetched adapter into the cache. Raises the error that came instead, or `BasisMismatch`."""
        self._requested.discard(ref)
        self._missing.pop(ref, None)
        is_unwanted = ref in self._unloaded and ref not in self._users
        if is_unwanted:
            self._unloaded.discard(ref)
        if not isinstance(adapter, TesseraError) and adapter.basis_id != ref.basis_id:
            adapter = BasisMismatch(f"adapter {ref.adapter_id} belongs to basis {adapter.basis_id}")
        if isinstance(adapter, TesseraError):
            self.num_load_failures += 1
            raise adapter
        if isinstance(adapter, Adapter):
            adapter = self.bases.slot_format.pack(adapter)
        if not is_unwanted:
            self.cache.put(ref, adapter)

    def unload(self, tenant: str, adapter_id: str) -> None:
        """Drop every version of an adapter. The cache and the slots drop it now, except that requests in
        flight keep their slots; one that is being fetched is dropped once it has arrived and no request needs
        it."""
        known = {*self.cache.refs, *self._requested, *self._users}
        for table in self.bases.tables.values():
            known.update(table.refs)
        for ref in known:
            if (ref.tenant, ref.adapter_id) == (tenant, adapter_id):
                self._drop(ref)
                if ref in self._users or ref in self._requested:
                    self._unloaded.add(ref)

    def check_integrity(self) -> None:
        self.cache.check_integrity()
        self.bases.check_integrity()
        assert all(count > 0 for count in self._users.values())
        assert self._missing.keys() <= self._requested
        assert all(ref in self._users or ref in self._requested for ref in self._unloaded)

    def _drop(self, ref: AdapterRef) -> None:
        self.cache.drop(ref)
        resident = self.bases.find(ref.basis_id)
        if resident is not None:
            resident.slots.drop(ref)
        if ref not in self._requested:
            self._unloaded.discard(ref)
