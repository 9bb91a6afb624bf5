"""The bases on the device, each with its slot table, and the bases that requests are waiting for.

At most `max_resident_bases` are resident at once. A basis that the operator added stays. One that came with a
request is evicted for another once no request needs it, the least recently used first. If that does not
happen, a basis is closed to new requests until it is idle. A basis is fetched only when there is a place for
it, because its factors are large (84 MB for an 8B model at rank 16).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from service.engine.adapters.linear import attach, detach
from service.engine.adapters.packed_adapter import SlotFormat
from service.engine.adapters.slots import SlotTable
from service.engine.settings import EngineConfig
from tessera.errors import BasisMismatch, InvalidInput, RequestFailed, TesseraError, UnsupportedModel
from tessera.formats.basis import Basis
from tessera.formats.manifest import BasisManifest

#: After this many scheduling passes without a place for a missing basis, the least recently used one takes no
#: new requests until it is idle. At 10 to 30 ms per step this is about a second: long enough for bursts to
#: end by themselves, and short enough for the request that waits.
MAX_BLOCKED_PASSES = 64

#: Slots of a basis that belongs to one tenant, usually to a single adapter: enough for its versions and a few
#: more. 256 slots of rank 64 on an 8B model would take 470 MB beside 335 MB of factors.
OWN_BASIS_SLOTS = 8


@dataclass(frozen=True)
class ResidentBasis:
    """A basis on the device. Its factors are in the model's layers; of the host's copy only the manifest is
    kept."""

    manifest: BasisManifest
    slots: SlotTable
    #: Whether it is never evicted.
    is_permanent: bool
    #: Bytes of its factors on the device.
    factor_bytes: int


class ResidentBases:
    """The bases that the linear layers of `model` serve. unfit: layers that cannot carry adapters, with the
    reason."""

    def __init__(
        self,
        model: nn.Module,
        model_id: str,
        config: EngineConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        unfit: Mapping[str, str] | None = None,
    ) -> None:
        self._unfit = dict(unfit or {})
        self._model = model
        self._model_id = model_id
        self._config = config
        self._device = device
        self._dtype = dtype
        self._resident: OrderedDict[str, ResidentBasis] = OrderedDict()  # least recently used first
        self._missing: OrderedDict[str, None] = OrderedDict()
        self._being_fetched: set[str] = set()
        self._users: Counter[str] = Counter()
        self._closing: str | None = None
        self._num_blocked_passes = 0
        #: The first permanent basis, or "".
        self.default_id = ""
        #: The form of the slots of all bases.
        self.slot_format = SlotFormat(dtype, is_pinned=device.type == "cuda")
        self._num_slot_loads = self._num_slot_evictions = 0  # of bases that were evicted

    def __len__(self) -> int:
        return len(self._resident)

    def __contains__(self, basis_id: str) -> bool:
        return basis_id in self._resident

    @property
    def tables(self) -> dict[str, SlotTable]:
        return {basis_id: resident.slots for basis_id, resident in self._resident.items()}

    @property
    def factor_bytes(self) -> int:
        return sum(resident.factor_bytes for resident in self._resident.values())

    @property
    def num_slot_loads(self) -> int:
        return self._num_slot_loads + sum(table.num_loads for table in self.tables.values())

    @property
    def num_slot_evictions(self) -> int:
        return self._num_slot_evictions + sum(table.num_evictions for table in self.tables.values())

    def find(self, basis_id: str) -> ResidentBasis | None:
        return self._resident.get(basis_id)

    def use(self, basis_id: str) -> SlotTable:
        """Return the slots of a resident basis, which becomes the most recently used."""
        self._resident.move_to_end(basis_id)
        return self._resident[basis_id].slots

    def can_ever_hold(self, basis_id: str) -> bool:
        permanent = sum(resident.is_permanent for resident in self._resident.values())
        return basis_id in self._resident or permanent < self._config.max_resident_bases

    def add(self, basis: Basis, *, is_permanent: bool) -> None:
        """Make `basis` resident. Raises `BasisMismatch` (another model's), `InvalidInput` (no place),
        `UnsupportedModel` (a target module that cannot carry adapters)."""
        if basis.basis_id not in self._resident:
            self._install(basis)
        if is_permanent:
            resident = self._resident[basis.basis_id]
            self._resident[basis.basis_id] = replace(resident, is_permanent=True)
            self.default_id = self.default_id or basis.basis_id

    def retain(self, basis_id: str) -> None:
        """Note that one more request, waiting or running, needs the basis."""
        self._users[basis_id] += 1

    def release(self, basis_id: str) -> None:
        """Note that one request fewer needs the basis."""
        self._users[basis_id] -= 1
        if self._users[basis_id] == 0:
            del self._users[basis_id]
            self._missing.pop(basis_id, None)

    def request(self, basis_id: str) -> None:
        """List the basis as missing, unless it is resident or being fetched."""
        if basis_id not in self._resident and basis_id not in self._being_fetched:
            self._missing[basis_id] = None

    def provide(self, basis_id: str, basis: Basis | TesseraError) -> None:
        """Install a fetched basis. Raises the error that came instead, or why the basis cannot be
        resident."""
        self._being_fetched.discard(basis_id)
        self._missing.pop(basis_id, None)
        if isinstance(basis, TesseraError):
            raise basis
        if basis.basis_id != basis_id:
            raise BasisMismatch(f"basis {basis.basis_id} was provided for basis {basis_id}")
        try:
            self.add(basis, is_permanent=False)
        except torch.OutOfMemoryError as error:
            raise RequestFailed(f"no memory for basis {basis_id}: {error}", code="out_of_memory") from error

    @property
    def has_missing(self) -> bool:
        """Whether `take_missing` would return something."""
        return bool(self._missing) and (self._has_place() or self._evictable() is not None)

    def take_missing(self) -> list[str]:
        """Return the missing bases that have a place now. Each is returned once; idle bases are evicted for
        them."""
        missing = []
        while self._missing and self._make_place():
            basis_id, _ = self._missing.popitem(last=False)
            self._being_fetched.add(basis_id)
            missing.append(basis_id)
        return missing

    def begin_pass(self) -> str | None:
        """Count a scheduling pass. Returns the basis that must not take new requests, so that it becomes idle
        and can be evicted for one that has been missing for too long."""
        self._num_blocked_passes = self._num_blocked_passes + 1 if self._missing else 0
        if self._num_blocked_passes <= MAX_BLOCKED_PASSES:
            self._closing = None
        elif self._closing is None:
            self._closing = next((b for b, r in self._resident.items() if not r.is_permanent), None)
        return self._closing

    def check_integrity(self) -> None:
        assert len(self._resident) + len(self._being_fetched) <= self._config.max_resident_bases
        assert not self._resident.keys() & (self._missing.keys() | self._being_fetched)
        assert all(count > 0 for count in self._users.values())
        assert self._closing is None or self._closing in self._resident
        for resident in self._resident.values():
            resident.slots.check_integrity()

    def close(self) -> None:
        """Give the model its own linear layers back."""
        while self._resident:
            _, resident = self._resident.popitem()
            detach(self._model, resident.manifest)

    def _install(self, basis: Basis) -> None:
        if basis.manifest.model_id != self._model_id:
            raise BasisMismatch(f"basis {basis.basis_id} belongs to another base model than this engine's")
        for module in basis.manifest.modules:
            if module.name in self._unfit:
                raise UnsupportedModel(
                    f"layer {module.name} cannot carry adapters: {self._unfit[module.name]}; leave it out of "
                    "the target modules",
                    param="target_modules",
                )
        if not self._make_place():
            raise InvalidInput(f"no place for basis {basis.basis_id} beside {len(self)} others")
        slots = SlotTable(
            (basis.num_modules, basis.rank),
            num_slots=min(self._config.num_slots, OWN_BASIS_SLOTS)
            if basis.manifest.is_own
            else self._config.num_slots,
            max_tokens=self._config.max_batch_tokens,
            device=self._device,
            dtype=self.slot_format.dtype,
        )
        attach(self._model, basis, slots)
        numbers = sum(A.numel() + B.numel() for A, B in zip(basis.A, basis.B, strict=True))
        self._resident[basis.basis_id] = ResidentBasis(
            basis.manifest, slots, is_permanent=False, factor_bytes=numbers * self._dtype.itemsize
        )
        self._missing.pop(basis.basis_id, None)

    def _has_place(self) -> bool:
        return len(self._resident) + len(self._being_fetched) < self._config.max_resident_bases

    def _evictable(self) -> str | None:
        """Return the least recently used basis that no request needs, or the closed basis once it is idle.
        Otherwise requests that wait for an idle basis keep it; without this, two bases could evict each other
        before either is used."""
        for basis_id, resident in self._resident.items():
            is_needed = basis_id in self._users and basis_id != self._closing
            if not (resident.is_permanent or resident.slots.num_pinned or is_needed):
                return basis_id
        return None

    def _make_place(self) -> bool:
        if self._has_place():
            return True
        evicted = self._evictable()
        if evicted is None:
            return False
        self._closing, self._num_blocked_passes = None, 0
        resident = self._resident.pop(evicted)
        detach(self._model, resident.manifest)
        self._num_slot_loads += resident.slots.num_loads
        self._num_slot_evictions += resident.slots.num_evictions + resident.slots.num_resident
        return True
